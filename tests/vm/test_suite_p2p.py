# SPDX-License-Identifier: Apache-2.0
"""The p2p-iommu suite on real machines: all PASS, booted or restored, and breaks that must FAIL."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.deploy import StartOptions
from testbed.errors import ExitCode
from testbed.harness.sources import TopologySource
from testbed.instruments.mutations import Mutation
from testbed.machine.command import CONSOLE_LOG
from testbed.page.peers import run_matrix
from testbed.rack import Rack
from testbed.results.verdicts import Outcome, Verdict
from testbed.topology.compare import compare
from testbed.topology.matrix import Arrival, Measured, Way
from testbed.topology.model import with_overrides
from tests.vm.conftest import Start, shipped
from tests.vm.runs import BorrowingSource, Ran, run, was_restored

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

SUITE = "p2p-iommu"
# Whoever uses a mapping of a peer's BAR.
USES_A_BAR = {"MAP-02", "MAP-04", "MAP-06", "MAP-09", "MAP-10", "TOPO-15", "FLT-05"}
BESIDES = "not scalable"  # it boots a second machine


@pytest.fixture(scope="module")
def booted(start: Start, cold: StartOptions) -> Rack:
    return start(shipped("quad-gpu"), cold)


@pytest.fixture(scope="module")
def restored(start: Start) -> Rack:
    return start(shipped("quad-gpu"))


@pytest.fixture(scope="module")
def honest(booted: Rack, cold: StartOptions, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The suite on a machine that booted for it."""
    folder = tmp_path_factory.mktemp("honest")
    return run(SUITE, BorrowingSource(booted, folder, cold), folder)


def test_every_requirement_is_shown(booted: Rack, honest: Ran) -> None:
    assert compare(booted.node().plan, booted.node().agent.call("pci.tree")["devices"]) == []
    assert set(honest.verdicts.values()) == {Verdict.PASS}, honest.ktap
    assert honest.code is ExitCode.PASS
    by_id: dict[str, Outcome] = {o.requirements[0]: o for o in honest.outcomes}
    for requirement in ("MAP-01", "MAP-03", "MAP-05", "MAP-06", "MAP-08"):
        kinds = {evidence.kind for evidence in by_id[requirement].evidence}
        assert "fault" in kinds, requirement
    for requirement in ("MAP-02", "MAP-04", "MAP-10"):
        seen = [e for e in by_id[requirement].evidence if e.kind == "bytes"]
        assert {e.witness for e in seen} == {"guest", "host"}, requirement
    # What the page of this run makes of it.
    pair = run_matrix(booted.plan, {}, honest.outcomes).cells["gpu0", "gpu1"]
    assert pair.measured == Measured({Way.RAW: Arrival.REFUSED, Way.IOVA: Arrival.IOMMU})
    (span,) = by_id["MAP-01"].console
    log = (booted.run_dir / span.node / CONSOLE_LOG).read_bytes()
    assert b"DMAR: [DMA" in log[span.begin_bytes : span.end_bytes]


def test_a_restored_machine_gives_the_same_verdicts(
    honest: Ran, restored: Rack, cold: StartOptions, tmp_path: Path
) -> None:
    """Cold, then warm. (The machine of another kind is booted for both.)"""
    assert was_restored(restored)
    again = run(SUITE, BorrowingSource(restored, tmp_path, cold), tmp_path, BESIDES)
    assert again.by_title == {
        title: verdict for title, verdict in honest.by_title.items() if "scalable" not in title
    }, again.ktap


@pytest.mark.parametrize(
    ("mutation", "ids"),
    [(Mutation.SKIP_UNMAP, {"MAP-06"}), (Mutation.BAR_ADDRESS, USES_A_BAR)],
    ids=["skip-unmap", "bar-address"],
)
def test_a_break_fails_what_guards_it(
    restored: Rack, cold: StartOptions, tmp_path: Path, mutation: Mutation, ids: set[str]
) -> None:
    source = BorrowingSource(restored, tmp_path, cold)
    broken = run(SUITE, source, tmp_path, BESIDES, mutation)
    assert broken.failed == ids, broken.ktap
    assert broken.code is ExitCode.FAIL
    # The rack is none the worse for it.
    source = BorrowingSource(restored, tmp_path, cold)
    mended = run(SUITE, source, tmp_path, "unmapped_after_use or scatter")
    assert mended.code is ExitCode.PASS, mended.ktap


def test_without_an_iommu_the_suite_says_what_it_cannot_show(
    cold: StartOptions, tmp_path: Path
) -> None:
    topology = with_overrides(shipped("two-root-ports"), iommu_mode="off")
    ran = run(SUITE, TopologySource(topology, tmp_path, options=cold), tmp_path)
    verdicts = ran.verdicts
    assert verdicts.pop("MAP-07") is Verdict.PASS, ran.ktap
    assert set(verdicts.values()) == {Verdict.SKIP}
    assert "MAP-03 raw_bar_address_faults[gpu0-gpu1] # SKIP IOMMU off" in ran.ktap
    assert ran.code is ExitCode.PASS
