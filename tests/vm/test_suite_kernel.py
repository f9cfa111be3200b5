# SPDX-License-Identifier: Apache-2.0
"""The suite about the kernel's own peer-to-peer DMA, on a kernel."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from testbed import deploy
from testbed.errors import ExitCode
from testbed.harness.runner import Choice, run_suites
from testbed.harness.sources import TopologySource
from testbed.host.prepare import Installation
from testbed.instruments.mutations import Mutation
from testbed.page.render import render
from testbed.results.verdicts import Verdict
from testbed.topology import load

pytestmark = pytest.mark.timeout(240)

# Every route between disks, in a small machine.
TOPOLOGY = """\
rack: disks
vars: {cpu: max}
nodes:
  host0:
    machine: {cpu: {{ cpu }}, memory: 512M}
    pcie:
      - root_port: rp0
        below:
          - switch: plain
            below:
              - {nvme: nvme0, size: 16M, cmb: 16M}
              - {nvme: nvme1, size: 16M}
              - {gpu: gpu0, vram: 16M}
      - root_port: rp1
        below:
          - switch: redirecting
            acs: redirect
            below:
              - {nvme: nvme2, size: 16M, cmb: 16M}
              - {nvme: nvme3, size: 16M}
"""
INTEL_ONLY = {"TOPO-04", "TOPO-07", "TOPO-10"}
AMD_ONLY = {"TOPO-05", "TOPO-06", "TOPO-08"}
BOTH = {*(f"TOPO-{n:02}" for n in (1, 2, 3, 9, 11, 12)), "LIFE-08", "LIFE-09"}


# What is broken on purpose, the tests that are run, and the requirements that then must fail. (The
# others were watched by hand: elsewhere fails all that move data, wrong-cpu TOPO-12.)
BREAKS = [
    (Mutation.NO_ROUTER, "plain_switch", {"TOPO-03"}),
    (Mutation.NEAR_PAIR, "unlisted or change_of_acs", INTEL_ONLY),
    (Mutation.HIDE_NEAREST, "nearest or kernel_does", {"TOPO-11"}),
]


def run(
    cpu: str,
    keyword: str,
    installation: Installation,
    accelerator: str,
    folder: Path,
    mutation: Mutation = Mutation.NONE,
) -> tuple[dict[str, Verdict], str, ExitCode]:
    # What is broken is broken in one and the same machine: booted once, then restored.
    options = deploy.StartOptions(
        accelerator=accelerator, installation=installation, warm=mutation is not Mutation.NONE
    )
    topology = load.load_text(TOPOLOGY, "disks.yaml", {"cpu": cpu})
    stream = io.StringIO()
    result = run_suites(
        Choice(["p2p-kernel"], keyword, mutation),
        TopologySource(topology, folder, options=options),
        folder,
        stream=stream,
        console=Console(file=io.StringIO()),
    )
    verdicts = {r.requirement: r.verdict for r in result.record.requirements}
    return verdicts, stream.getvalue(), result.code


def test_behind_a_host_bridge_that_linux_does_not_know(
    installation: Installation, accelerator: str, tmp_path: Path
) -> None:
    verdicts, ktap, code = run("max", "", installation, accelerator, tmp_path)
    assert verdicts == {
        **dict.fromkeys(BOTH | INTEL_ONLY, Verdict.PASS),
        **dict.fromkeys(AMD_ONLY, Verdict.SKIP),
    }, ktap
    assert "# SKIP an AMD processor of family 0x17 or later" in ktap
    assert code is ExitCode.PASS
    # Its page: what the kernel said of each pair, and what was asked of it in which test.
    page = render(tmp_path)
    assert "6 pairs, 6 asked of the kernel" in page
    assert page.index("TOPO-12</h3>") < page.index("p2p.map_types")
    assert "Where nothing is drawn, machines booted" in page


def test_behind_that_of_an_amd_processor(
    installation: Installation, accelerator: str, tmp_path: Path
) -> None:
    verdicts, ktap, _ = run("EPYC", "amd or kernel_does", installation, accelerator, tmp_path)
    assert verdicts == dict.fromkeys(AMD_ONLY | {"TOPO-12"}, Verdict.PASS), ktap


@pytest.mark.parametrize(("mutation", "keyword", "ids"), BREAKS, ids=[b[0] for b in BREAKS])
def test_a_break_fails_what_guards_it(
    installation: Installation,
    accelerator: str,
    tmp_path: Path,
    mutation: Mutation,
    keyword: str,
    ids: set[str],
) -> None:
    verdicts, ktap, code = run("max", keyword, installation, accelerator, tmp_path, mutation)
    assert {name for name, verdict in verdicts.items() if verdict is Verdict.FAIL} == ids, ktap
    assert code is ExitCode.FAIL
