# SPDX-License-Identifier: Apache-2.0
"""The suite about scale-up fabrics, on two small machines: breaks that must FAIL, then PASSes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from testbed import deploy
from testbed.errors import ExitCode
from testbed.harness.runner import Choice, RunResult, run_suites
from testbed.harness.sources import TopologySource
from testbed.host.prepare import Installation
from testbed.rack import Rack
from testbed.results.verdicts import Verdict
from testbed.topology import load
from testbed.topology.model import Topology
from tests.vm.test_suite_p2p import BorrowingSource

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


class HandingOver(TopologySource):
    """Gives a rack away that runs already: who has it ends it, and restarts its nodes."""

    def __init__(self, rack: Rack, run_dir: Path, options: deploy.StartOptions) -> None:
        super().__init__(rack.topology, run_dir, options=options)
        self._rack = rack

    def start(self, topology: Topology, label: str) -> Any:
        del topology, label
        return self._rack


@pytest.fixture(scope="module")
def options(installation: Installation, accelerator: str) -> deploy.StartOptions:
    return deploy.StartOptions(accelerator=accelerator, installation=installation)


@pytest.fixture(scope="module")
def pair(options: deploy.StartOptions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    topology = load.load_text(TOPOLOGY, "pair.yaml", {})
    with deploy.start(topology, run_dir=tmp_path_factory.mktemp("p"), options=options) as rack:
        yield rack


def run(suite: str, keyword: str, source: TopologySource, folder: Path) -> tuple[RunResult, str]:
    stream = io.StringIO()
    console = Console(file=io.StringIO())
    result = run_suites(Choice([suite], keyword), source, folder, stream=stream, console=console)
    return result, stream.getvalue()


def test_each_break_fails_what_guards_it(
    pair: Rack, options: deploy.StartOptions, tmp_path: Path
) -> None:
    result, ktap = run(str(BREAKS), "", BorrowingSource(pair, tmp_path, options), tmp_path)
    verdicts = {r.requirement: r.verdict for r in result.record.requirements}
    assert verdicts == dict.fromkeys(
        [f"FAB-{n:02}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9)] + ["NEG-08"], Verdict.PASS
    ), ktap


def test_the_other_machine_s_memory_and_its_interrupts(
    pair: Rack, options: deploy.StartOptions, tmp_path: Path
) -> None:
    """The last one: the rack is given away, and a node of it is killed and comes back."""
    result, ktap = run("p2p-fabric", CHOSEN, HandingOver(pair, tmp_path, options), tmp_path)
    verdicts = {r.requirement: r.verdict for r in result.record.requirements}
    shown = ("FAB-01", "FAB-03", "FAB-04", "FAB-05", "FAB-08", "FAB-09", "FAB-10", "NEG-08")
    assert verdicts == dict.fromkeys(shown, Verdict.PASS), ktap
    assert result.code is ExitCode.PASS
