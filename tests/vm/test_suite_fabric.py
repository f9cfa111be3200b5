# SPDX-License-Identifier: Apache-2.0
"""The suite about scale-up fabrics, on two small machines: breaks that must FAIL, then PASSes."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.deploy import StartOptions
from testbed.errors import ExitCode
from testbed.rack import Rack
from testbed.results import trace
from testbed.results.verdicts import Verdict
from testbed.topology import load
from tests.vm.conftest import Start
from tests.vm.runs import BorrowingSource, HandingOver, run

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

TOPOLOGY = """\
rack: pair
nodes:
{% for node, gpus in [("one", 2), ("two", 1)] %}
  {{ node }}:
    machine: {vcpus: 1, memory: 512M}
    iommu: {kind: intel, mode: strict}
    kernel_args: [pci=hpmmioprefsize=32M]
    pcie:
      {% for i in range(gpus) %}
      - root_port: rp{{ i }}
        below: [{gpu: gpu{{ i }}, vram: 16M, engine: model}]
      {% endfor %}
      - {bell: bell0}
      - root_port: rp-card
        below: [{nic: card0, engine: igb}]
      - root_port: spare
{% endfor %}
links:
  - {kind: ual, between: [one/gpu0, two/gpu0]}
  - {kind: ual, between: [one/gpu0, one/gpu1]}
"""
BREAKS = Path(__file__).parents[1] / "breaks" / "fabric_breaks.py"
CHOSEN = (
    "needs_no_mapping or link_sync or goes_down or one_system or window or interrupt or node_that"
    " or between_nodes or load"
)


@pytest.fixture(scope="module")
def pair(start: Start, cold: StartOptions) -> Rack:
    return start(load.load_text(TOPOLOGY, "pair.yaml", {}), cold)


def test_each_break_fails_what_guards_it(pair: Rack, cold: StartOptions, tmp_path: Path) -> None:
    ran = run(BREAKS, BorrowingSource(pair, tmp_path, cold), tmp_path)
    assert ran.verdicts == dict.fromkeys(
        [f"FAB-{n:02}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9)] + ["NEG-08"], Verdict.PASS
    ), ran.ktap


def test_the_other_machine_s_memory_and_its_interrupts(
    pair: Rack, cold: StartOptions, tmp_path: Path
) -> None:
    """The last one: the rack is given away, and a node of it is killed and comes back."""
    ran = run("p2p-fabric", HandingOver(pair, tmp_path, cold), tmp_path, CHOSEN)
    shown = ("FAB-01", "FAB-03", "FAB-04", "FAB-05", "FAB-08", "FAB-09", "FAB-10", "NEG-08")
    assert ran.verdicts == dict.fromkeys(shown, Verdict.PASS), ran.ktap
    assert ran.code is ExitCode.PASS
    rooms = trace.read(pair.run_dir)
    kinds: dict[str, set[str]] = {"one": set(), "two": set()}
    for room in rooms:
        kinds[room.node] |= {event.kind for event in room.events}
    assert {"map", "unmap", "copy", "fault", "attach", "negotiate", "answer"} <= kinds["one"]
    assert {"test", "join", "alloc", "link", "sync", "unlink", "free", "close"} <= kinds["two"]
    assert [room.node for room in rooms].count("two") > 1, "it was started again, and told"
    for room in rooms:
        given = {event.number for event in room.events if event.kind == "alloc"}
        assert all(event.cause in given for event in room.events if event.kind == "link")
