# SPDX-License-Identifier: Apache-2.0
"""Programs in the kernel's place, on the machine as it is rendered; ours, made like theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.deploy import StartOptions
from testbed.harness.sources import TopologySource
from testbed.payload.multiboot import find_programs
from testbed.results.verdicts import Verdict
from testbed.topology import load
from tests.vm.machine_programs import HANG, TRIPLE_FAULT, Program, ended
from tests.vm.runs import run

pytestmark = [pytest.mark.vm, pytest.mark.timeout(120)]

TOPOLOGY = """\
rack: bare
vars: {iommu: intel}
nodes:
  host0:
    machine: {memory: 256M}
    iommu: {kind: {{ iommu }}}
    pcie:
      - {gpu: gpu0, vram: 16M, engine: model}
"""
PROGRAMS = {
    "intel-iommu": Program()
    .say_if_vtd("PASS: a unit answers", "FAIL: a unit answers")
    .say("SKIP: more", "SUMMARY: 2 tests, 1 skipped")
    .then(ended(0)),
    "refuted": Program().say("FAIL: a", "SUMMARY: 1 tests, 1 unexpected failures").then(ended(1)),
    "hangs": Program().say("PASS: a").then(HANG),
    "dies": Program().say("PASS: a").then(TRIPLE_FAULT),
}
HANG_S = 10


def test_programs_end_in_every_way(cold: StartOptions, tmp_path: Path) -> None:
    (tmp_path / "x86").mkdir()
    for name, program in PROGRAMS.items():
        (tmp_path / f"x86/{name}.flat").write_bytes(program.image())

    def on(iommu: str, *names: str) -> dict[str, tuple[Verdict, str]]:
        folder = tmp_path / iommu
        folder.mkdir()
        topology = load.load_text(TOPOLOGY, "bare.yaml", {"iommu": iommu})
        source = TopologySource(topology, folder, options=cold)
        payload = find_programs(tmp_path, names, HANG_S)
        ran = run("kvm-unit-tests", source, folder, payload=payload)
        return {o.test: (o.verdict, o.reason) for o in ran.outcomes}

    assert on("intel", *PROGRAMS) == {
        "intel-iommu/a unit answers": (Verdict.PASS, ""),
        "intel-iommu/more": (Verdict.SKIP, "more"),
        "refuted/a": (Verdict.FAIL, "a"),
        "hangs/a": (Verdict.PASS, ""),
        "hangs": (Verdict.LOST, f"it did not end within {HANG_S} s"),
        "dies/a": (Verdict.PASS, ""),
        "dies": (Verdict.LOST, "QEMU ended with status 0, which is no result"),
    }
    # The program sees the machine of the topology: without an IOMMU it says so.
    without = on("none", "intel-iommu")
    assert without["intel-iommu/a unit answers"] == (Verdict.FAIL, "a unit answers")
