# SPDX-License-Identifier: Apache-2.0
"""What a run says of pairs: the kernel's words, judged moves, and unknown where nobody asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from testbed.page.load import placed
from testbed.page.peers import run_matrix
from testbed.results.evidence import Access, BytesChecked, Counter, Evidence, FaultSeen, Witness
from testbed.results.verdicts import Outcome, Verdict
from testbed.topology.matrix import (
    Arrival,
    Decision,
    MapKind,
    Matrix,
    Measured,
    Unknown,
    Way,
)
from testbed.topology.plan import RackPlan
from tests.unit.page.run_folder import MOVED, topology_data

PAIR = ("gpu0", "gpu1")


@pytest.fixture(scope="module")
def plan() -> RackPlan:
    return placed(topology_data())


def matrix_of(
    plan: RackPlan, *outcomes: Outcome, calls: list[dict[str, Any]] | None = None
) -> Matrix:
    return run_matrix(plan, {"host0": calls or []}, outcomes)


def bdf(plan: RackPlan, name: str) -> str:
    return plan.nodes["host0"].function(name).bdf


def refused(plan: RackPlan, **fault: Any) -> tuple[Evidence, ...]:
    seen = FaultSeen(bdf(plan, "gpu0.engine"), 1, Access.WRITE, 5, Witness.MACHINE)
    place = BytesChecked("gpu1.vram+0x0", 64, Witness.HOST, "aa", "aa")
    return (replace(seen, **fault), place)


def test_nothing_is_known_where_nothing_was_asked(plan: RackPlan) -> None:
    for cell in matrix_of(plan).cells.values():
        assert isinstance(cell.kernel, Unknown)
        assert isinstance(cell.measured, Unknown)
        assert "no test of this run" in cell.kernel.why


def test_the_kernels_last_word_counts(plan: RackPlan) -> None:
    provider, client = bdf(plan, "gpu1.vram"), bdf(plan, "gpu0.engine")
    asked = {"provider": provider, "clients": [client]}
    calls: list[dict[str, Any]] = [
        {"method": "p2p.distance", "params": asked, "result": {client: 4, "all": 4}},
        {"method": "p2p.map_types", "params": asked, "result": {client: {"type": "bus"}}},
    ]
    assert matrix_of(plan, calls=calls).cells[PAIR].kernel == Decision(MapKind.BUS, 4)
    refusal = {"method": "p2p.map_types", "params": asked, "result": {client: {"type": "refused"}}}
    after = matrix_of(plan, calls=[*calls, refusal]).cells[PAIR]
    assert after.kernel == Decision(MapKind.NONE, None)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"method": "p2p.map_types"},
        {"method": "p2p.map_types", "params": {"provider": 3}, "result": {"x": 1}},
        {"method": "p2p.map_types", "params": [], "result": {}},
        {"method": "p2p.distance", "params": {"provider": "0000:04:00.0"}, "result": {"a": "b"}},
        {
            "method": "p2p.map_types",
            "params": {"provider": "0000:04:00.0"},
            "result": {"0000:03:00.1": {"type": "odd"}},
        },
        {"method": ["p2p.distance"], "params": None, "result": None},
    ],
)
def test_observations_of_another_form_say_nothing(plan: RackPlan, call: dict[str, Any]) -> None:
    found = matrix_of(plan, calls=[call])
    assert all(isinstance(cell.kernel, Unknown) for cell in found.cells.values())


def test_bytes_that_two_witnesses_saw_arrive_are_measured(plan: RackPlan) -> None:
    cell = matrix_of(plan, MOVED).cells[PAIR]
    assert cell.measured == Measured({Way.IOVA: Arrival.IOMMU})
    assert isinstance(matrix_of(plan, MOVED).cells["gpu1", "gpu0"].measured, Unknown)


def test_a_refusal_is_measured_by_the_fault_of_the_requester(plan: RackPlan) -> None:
    raw = replace(MOVED, evidence=refused(plan))
    assert matrix_of(plan, raw).cells[PAIR].measured == Measured({Way.RAW: Arrival.REFUSED})
    for other in ({"requester": "0000:09:00.0"}, {"access": Access.READ}):
        stranger = replace(MOVED, evidence=refused(plan, **other))
        assert isinstance(matrix_of(plan, stranger).cells[PAIR].measured, Unknown)


def test_ways_add_up(plan: RackPlan) -> None:
    raw = replace(MOVED, evidence=refused(plan))
    found = matrix_of(plan, MOVED, raw).cells[PAIR].measured
    assert found == Measured({Way.IOVA: Arrival.IOMMU, Way.RAW: Arrival.REFUSED})


def test_wrong_bytes_are_no_arrival(plan: RackPlan) -> None:
    wrong = BytesChecked("gpu1.vram+0x0", 64, Witness.HOST, "aa", "bb")
    outcome = replace(MOVED, evidence=(*MOVED.evidence, wrong))
    assert isinstance(matrix_of(plan, outcome).cells[PAIR].measured, Unknown)


def test_a_failure_outweighs_what_passed_beside_it(plan: RackPlan) -> None:
    failed = replace(MOVED, verdict=Verdict.FAIL, reason="bytes differ")
    measured = matrix_of(plan, MOVED, failed).cells[PAIR].measured
    assert isinstance(measured, Unknown)
    assert "MAP-03 mapped[gpu0-gpu1] ended FAIL: bytes differ" in measured.why


def test_a_claim_of_the_device_alone_is_nothing(plan: RackPlan) -> None:
    claims = replace(MOVED, evidence=(Counter("device says copied", 4096, "bytes"),))
    assert isinstance(matrix_of(plan, claims).cells[PAIR].measured, Unknown)
