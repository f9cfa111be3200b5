# SPDX-License-Identifier: Apache-2.0
"""The suite about the kernel's own peer-to-peer DMA, on a kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.deploy import StartOptions
from testbed.errors import ExitCode
from testbed.harness.sources import TopologySource
from testbed.instruments.mutations import Mutation
from testbed.page.render import render
from testbed.results.verdicts import Verdict
from testbed.topology import load
from tests.vm.runs import Ran, RestoringSource, run

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


def on_disks(
    options: StartOptions, folder: Path, cpu: str, keyword: str, mutation: Mutation = Mutation.NONE
) -> Ran:
    """``max`` is restored: one and the same machine for all that is broken, and for what is not."""
    topology = load.load_text(TOPOLOGY, "disks.yaml", {"cpu": cpu})
    source = (
        RestoringSource(topology, folder, options)
        if cpu == "max"
        else TopologySource(topology, folder, options=options)
    )
    return run("p2p-kernel", source, folder, keyword, mutation)


def test_behind_a_host_bridge_that_linux_does_not_know(cold: StartOptions, tmp_path: Path) -> None:
    ran = on_disks(cold, tmp_path, "max", "")
    assert ran.verdicts == {
        **dict.fromkeys(BOTH | INTEL_ONLY, Verdict.PASS),
        **dict.fromkeys(AMD_ONLY, Verdict.SKIP),
    }, ran.ktap
    assert "# SKIP an AMD processor of family 0x17 or later" in ran.ktap
    assert ran.code is ExitCode.PASS
    # Its page: what the kernel said of each pair, and what was asked of it in which test.
    page = render(tmp_path)
    assert "6 pairs, 6 asked of the kernel" in page
    assert page.index("TOPO-12</h3>") < page.index("p2p.map_types")
    assert "Where nothing is drawn, machines booted" in page


def test_behind_that_of_an_amd_processor(cold: StartOptions, tmp_path: Path) -> None:
    ran = on_disks(cold, tmp_path, "EPYC", "amd or kernel_does")
    assert ran.verdicts == dict.fromkeys(AMD_ONLY | {"TOPO-12"}, Verdict.PASS), ran.ktap


@pytest.mark.parametrize(("mutation", "keyword", "ids"), BREAKS, ids=[b[0] for b in BREAKS])
def test_a_break_fails_what_guards_it(
    cold: StartOptions, tmp_path: Path, mutation: Mutation, keyword: str, ids: set[str]
) -> None:
    ran = on_disks(cold, tmp_path, "max", keyword, mutation)
    assert ran.failed == ids, ran.ktap
    assert ran.code is ExitCode.FAIL
