# SPDX-License-Identifier: Apache-2.0
"""The p2p-iommu suite on real machines: all PASS, and two deliberate breaks that must FAIL."""

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
from testbed.instruments.mutations import Mutation
from testbed.machine.command import CONSOLE_LOG
from testbed.page.peers import run_matrix
from testbed.rack import Rack
from testbed.results.verdicts import Outcome, Verdict
from testbed.topology.matrix import Arrival, Measured, Way
from testbed.topology.model import Topology, with_overrides
from tests.vm.conftest import shipped

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

# Whoever uses a mapping of a peer's BAR.
USES_A_BAR = {"MAP-02", "MAP-04", "MAP-06", "MAP-09", "MAP-10", "TOPO-15", "FLT-05"}
BESIDES = "not scalable"  # it boots a second machine


class Borrowed:
    """A rack that the suite may use, but not end."""

    def __init__(self, rack: Rack) -> None:
        self._rack = rack

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rack, name)

    def close(self) -> None:
        """It belongs to the tests of this file."""


class BorrowingSource(TopologySource):
    """Hands out one rack for all runs, and boots variants."""

    restartable = False

    def __init__(self, rack: Rack, run_dir: Path, options: deploy.StartOptions) -> None:
        super().__init__(rack.topology, run_dir, options=options)
        self._borrowed = Borrowed(rack)

    def start(self, topology: Topology, label: str) -> Any:
        return self._borrowed if topology is self.topology else super().start(topology, label)


@pytest.fixture(scope="module")
def options(installation: Installation, accelerator: str) -> deploy.StartOptions:
    return deploy.StartOptions(accelerator=accelerator, installation=installation)


@pytest.fixture(scope="module")
def quad(options: deploy.StartOptions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    with deploy.start(
        shipped("quad-gpu"), run_dir=tmp_path_factory.mktemp("quad"), options=options
    ) as rack:
        yield rack


def run(source: TopologySource, run_dir: Path, **choice: Any) -> tuple[RunResult, str]:
    stream = io.StringIO()
    result = run_suites(
        Choice(["p2p-iommu"], **choice),
        source,
        run_dir,
        stream=stream,
        console=Console(file=io.StringIO()),
    )
    return result, stream.getvalue()


def failed(result: RunResult) -> set[str]:
    return {r.requirement for r in result.record.requirements if r.verdict is Verdict.FAIL}


def test_every_requirement_is_shown(
    quad: Rack, options: deploy.StartOptions, tmp_path: Path
) -> None:
    result, ktap = run(BorrowingSource(quad, tmp_path, options), tmp_path)
    assert {r.verdict for r in result.record.requirements} == {Verdict.PASS}, ktap
    assert result.code is ExitCode.PASS
    by_id: dict[str, Outcome] = {o.requirements[0]: o for o in result.record.outcomes}
    for requirement in ("MAP-01", "MAP-03", "MAP-05", "MAP-06", "MAP-08"):
        kinds = {evidence.kind for evidence in by_id[requirement].evidence}
        assert "fault" in kinds, requirement
    for requirement in ("MAP-02", "MAP-04", "MAP-10"):
        seen = [e for e in by_id[requirement].evidence if e.kind == "bytes"]
        assert {e.witness for e in seen} == {"guest", "host"}, requirement
    # What the page of this run makes of it.
    pair = run_matrix(quad.plan, {}, result.record.outcomes).cells["gpu0", "gpu1"]
    assert pair.measured == Measured({Way.RAW: Arrival.REFUSED, Way.IOVA: Arrival.IOMMU})
    (span,) = by_id["MAP-01"].console
    log = (quad.run_dir / span.node / CONSOLE_LOG).read_bytes()
    assert b"DMAR: [DMA" in log[span.begin_bytes : span.end_bytes]


@pytest.mark.parametrize(
    ("mutation", "ids"),
    [(Mutation.SKIP_UNMAP, {"MAP-06"}), (Mutation.BAR_ADDRESS, USES_A_BAR)],
    ids=["skip-unmap", "bar-address"],
)
def test_a_break_fails_what_guards_it(
    quad: Rack,
    options: deploy.StartOptions,
    tmp_path: Path,
    mutation: Mutation,
    ids: set[str],
) -> None:
    source = BorrowingSource(quad, tmp_path, options)
    result, ktap = run(source, tmp_path, mutation=mutation, keyword=BESIDES)
    assert failed(result) == ids, ktap
    assert result.code is ExitCode.FAIL
    # The rack is none the worse for it.
    honest = BorrowingSource(quad, tmp_path, options)
    result, ktap = run(honest, tmp_path, keyword="unmapped_after_use or scatter")
    assert result.code is ExitCode.PASS, ktap


def test_without_an_iommu_the_suite_says_what_it_cannot_show(
    options: deploy.StartOptions, tmp_path: Path
) -> None:
    topology = with_overrides(shipped("two-root-ports"), iommu_mode="off")
    result, ktap = run(TopologySource(topology, tmp_path, options=options), tmp_path)
    verdicts = {r.requirement: r.verdict for r in result.record.requirements}
    assert verdicts.pop("MAP-07") is Verdict.PASS, ktap
    assert set(verdicts.values()) == {Verdict.SKIP}
    assert "MAP-03 raw_bar_address_faults[gpu0-gpu1] # SKIP IOMMU off" in ktap
    assert result.code is ExitCode.PASS
