# SPDX-License-Identifier: Apache-2.0
"""The suite about dma-bufs, on a kernel; and what breaks when an exporter or importer is wrong."""

from __future__ import annotations

from itertools import filterfalse
from pathlib import Path

import pytest

from testbed.benchmarks import maps as bench_maps
from testbed.deploy import StartOptions
from testbed.harness.sources import TopologySource
from testbed.rack import Rack
from testbed.results.verdicts import Outcome, Verdict
from testbed.topology import load
from tests.vm.conftest import Start
from tests.vm.runs import HandingOver, Ran, run, verdicts_of

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

SUITE = "p2p-dmabuf"
# Both devices that the importer module can drive; importers of gpu0's memory come first.
TOPOLOGY = """\
rack: buffers
vars: {cpu: EPYC, engine: model}
nodes:
  host0:
    machine: {cpu: {{ cpu }}, memory: 512M}
    pcie:
      - root_port: rp0
        below:
          - {gpu: gpu0, vram: 16M, engine: model}
      - root_port: rp1
        below:
          - {gpu: gpu1, vram: 16M, engine: {{ engine }}}
"""
# Of drivers/dma-buf/dma-buf-mapping.c in 7.2: a kernel that maps two ranges makes this a PASS.
KERNEL_BUG = {"MAP-15"}
ALL = {
    *(f"MAP-{n}" for n in (11, 12, 13, 14, 15)),
    *(f"LIFE-{n:02}" for n in (1, 2, 3, 4, 5, 6, 7, 9, 11)),
    "FLT-01",
    "FLT-04",
    "MAP-03",
    "NEG-10",
}
BREAKS = Path(__file__).parents[1] / "breaks" / "dmabuf_breaks.py"


@pytest.fixture(scope="module")
def rack(start: Start, cold: StartOptions) -> Rack:
    return start(load.load_text(TOPOLOGY, "buffers.yaml", {}), cold)


def test_mapping_page_by_page_costs_many_times_what_mapping_at_once_does(rack: Rack) -> None:
    """The first one: the suite pulls a device out."""
    result = bench_maps.measure(rack, size_bytes=4 << 20, runs=3)
    ratios = result["ratio_to_contiguous"]
    assert set(ratios) == set(bench_maps.WAYS)
    # 60 for 4 MiB, emulated; 250 for 16.
    assert ratios["by_page"]["map"] > 5


@pytest.fixture(scope="module")
def both(rack: Rack, cold: StartOptions, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The breaks, then the suite: on one machine, and one of each other kind that they need."""
    folder = tmp_path_factory.mktemp("both")
    return run([BREAKS, SUITE], HandingOver(rack, folder, cold), folder)


def is_of_a_break(outcome: Outcome) -> bool:
    return outcome.test.startswith("a_break_fails[")


def test_of_every_requirement_some_break_is_seen(both: Ran) -> None:
    verdicts = verdicts_of(filter(is_of_a_break, both.outcomes))
    # LIFE-09 waits for a stuck engine: its break is watched by hand (tests/breaks/table.py).
    assert verdicts == dict.fromkeys(ALL - {"LIFE-09"}, Verdict.PASS), both.ktap


def test_right_exporters_pass_and_wrong_ones_are_caught(both: Ran) -> None:
    verdicts = verdicts_of(filterfalse(is_of_a_break, both.outcomes))
    assert set(verdicts) == ALL
    rest = {name: verdict for name, verdict in verdicts.items() if name not in KERNEL_BUG}
    assert rest == dict.fromkeys(ALL - KERNEL_BUG, Verdict.PASS), both.ktap
    assert verdicts["MAP-15"] is Verdict.FAIL, "mended? then say so in ARCHITECTURE"
    assert "EADDRINUSE" in both.ktap


def test_edu_as_the_independent_check(cold: StartOptions, tmp_path: Path) -> None:
    """Of this suite and of p2p-hmm, on one machine: the way leads through the IOMMU."""
    topology = load.load_text(TOPOLOGY, "buffers.yaml", {"engine": "edu"})
    source = TopologySource(topology, tmp_path, options=cold)
    keyword = "without_pages or hands_out or revoke_faults or owners or whose_pages"
    ran = run([SUITE, "p2p-hmm"], source, tmp_path, keyword)
    assert ran.verdicts == {
        **dict.fromkeys(("MAP-11", "MAP-03", "LIFE-04", "HMM-02", "HMM-04"), Verdict.PASS),
        "HMM-03": Verdict.SKIP,  # each pair has a way
    }, ran.ktap


def test_a_processor_whose_host_bridge_linux_does_not_trust(
    cold: StartOptions, tmp_path: Path
) -> None:
    topology = load.load_text(TOPOLOGY, "buffers.yaml", {"cpu": "max"})
    source = TopologySource(topology, tmp_path, options=cold)
    ran = run(SUITE, source, tmp_path, "p2pdma or acceptance or without_pages")
    assert ran.verdicts == {"NEG-10": Verdict.PASS, "MAP-11": Verdict.SKIP}, ran.ktap
    assert "# SKIP an AMD processor of family 0x17 or later" in ran.ktap
