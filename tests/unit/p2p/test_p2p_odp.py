# SPDX-License-Identifier: Apache-2.0
"""On-demand importers: faults, keep-alive fences, and progress against a GPU that churns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent.p2p.addresses import Address
from guest_agent.p2p.churn import Result, Setup, run_churn
from guest_agent.p2p.errors import FenceTimeoutError, RevokedError
from guest_agent.p2p.fence import Fence, FenceContext
from guest_agent.p2p.odp import FaultBudgetError, OnDemand
from guest_agent.p2p.resv import Usage, locked
from tests.unit.p2p.machines import DEVICE, SYSTEM, Machine, gpu_offers


@pytest.fixture
def machine() -> Machine:
    return Machine()


def on_demand(machine: Machine, **how: int) -> OnDemand:
    return OnDemand(machine.export(), "nic0.0", gpu_offers("nic0.0"), **how)


def test_it_faults_maps_goes_on_and_refaults_after_a_move(machine: Machine) -> None:
    nic = on_demand(machine)
    buffer = nic.attachment.buffer
    assert not nic.is_mapped
    nic.write(0, b"a" * 8192)
    assert nic.counters.faults == 1
    assert nic.read(0, 8192) == b"a" * 8192
    assert nic.counters.faults == 1
    machine.move(buffer, SYSTEM)
    assert not nic.is_mapped
    assert machine.backend.invalidated
    assert nic.read(0, 8192) == b"a" * 8192
    assert nic.counters.faults == 2
    assert nic.counters.refaults == 0


def test_a_fault_waits_for_memory_management(machine: Machine) -> None:
    nic = on_demand(machine)
    machine.backend.copy_ns = 50_000
    nic.write(0, b"wait")
    machine.move(nic.attachment.buffer, SYSTEM)
    assert nic.read(0, 4) == b"wait"
    assert machine.clock.now_ns() >= 50_000


def test_a_fault_does_not_wait_for_readers_and_writers(machine: Machine) -> None:
    nic = on_demand(machine)
    buffer = nic.attachment.buffer
    never = Fence(FenceContext("other"), "job", 10**15)
    with locked(machine.exporter, buffer.resv):
        buffer.resv.reserve(machine.exporter)
        buffer.resv.add(machine.exporter, never, Usage.WRITE)
    nic.fault()
    assert nic.is_mapped
    assert machine.clock.now_ns() == 0


def test_a_transfer_in_pieces_refaults_when_it_is_moved_in_between(machine: Machine) -> None:
    nic = on_demand(machine)
    data = bytes(range(256)) * 32
    for number, _ in enumerate(nic.steps(0, data, 1024)):
        if number in (1, 3):
            machine.move(nic.attachment.buffer, (SYSTEM, DEVICE)[number == 3])
    assert nic.counters.refaults == 2
    assert nic.read(0, 8192) == data


def test_memory_management_that_gets_stuck_is_named(machine: Machine) -> None:
    nic = on_demand(machine)
    buffer = nic.attachment.buffer
    stuck = Fence(FenceContext("gpu0 engine"), "copy", 10**9)
    with locked(machine.exporter, buffer.resv):
        buffer.resv.reserve(machine.exporter)
        buffer.resv.add(machine.exporter, stuck, Usage.KERNEL)
    with pytest.raises(FenceTimeoutError, match="gpu0 engine"):
        nic.fault()
    assert buffer.resv.holder is None


def test_a_revoked_buffer_is_told_to_the_transfer(machine: Machine) -> None:
    nic = on_demand(machine, keep_alive_ns=1000)
    nic.write(0, b"x")
    nic.fault()
    nic.attachment.buffer.revoke(machine.exporter, "reset")  # waits for the keep-alive fence
    assert machine.clock.now_ns() == 1000
    with pytest.raises(RevokedError, match="reset"):
        nic.read(0, 1)
    assert machine.backend.mapped() == 0


def test_a_keep_alive_fence_lets_one_transfer_through_and_then_the_move(machine: Machine) -> None:
    nic = on_demand(machine, keep_alive_ns=10_000)
    buffer = nic.attachment.buffer
    steps = nic.steps(0, b"b" * 4096, 1024)
    next(steps)
    machine.move(buffer, SYSTEM)  # wanted while the transfer is on its way
    machine.clock.run(5000)
    machine.core.graph.pump()
    assert machine.backend.copies == 0
    assert list(steps) == [b"b" * 1024] * 4
    assert nic.counters.faults == 1
    machine.core.graph.pump()
    assert machine.backend.copies == 1  # at once: the transfer gave the buffer free
    assert machine.clock.now_ns() == 5000
    machine.settle()
    assert machine.backend.mapped() == 0  # what was put off has been done
    assert nic.read(0, 4096) == b"b" * 4096


def test_a_keep_alive_fence_holds_up_nobody_else_s_access(machine: Machine) -> None:
    nic = on_demand(machine, keep_alive_ns=10**9)
    buffer = nic.attachment.buffer
    nic.fault()
    other = machine.attach(buffer, "gpu2")
    mapping, began = machine.map(other), list[Address]()
    with locked(machine.exporter, buffer.resv):
        other.submit(machine.exporter, mapping, "write", began.append, write=True)
    assert began
    assert machine.clock.now_ns() == 0


def test_an_idle_importer_keeps_nothing_longer_than_the_bound(machine: Machine) -> None:
    nic = on_demand(machine, keep_alive_ns=10_000)
    nic.fault()
    with locked(machine.exporter, nic.attachment.buffer.resv):
        moved = nic.attachment.buffer.move(machine.exporter, SYSTEM)
    moved.wait(machine.clock)
    assert machine.clock.now_ns() == 10_000 + machine.backend.copy_ns
    machine.settle()
    assert machine.backend.held() == 1


def test_a_transfer_that_faults_for_ever_gives_up(machine: Machine) -> None:
    nic = on_demand(machine, max_faults=5)

    def churned() -> None:
        for _ in nic.steps(0, 8192, 1024):
            machine.move(nic.attachment.buffer, (SYSTEM, DEVICE)[nic.counters.faults % 2 == 0])

    with pytest.raises(FaultBudgetError, match="5 faults"):
        churned()


# --- churn

HARSH = Setup(
    move_gap_ns=1_000,
    copy_ns=20_000,
    fault_ns=5_000,
    piece_ns=2_000,
    pieces=4,
    keep_alive_ns=15_000,
    run_ns=5_000_000,
)


def run(setup: Setup) -> tuple[Result, Machine, OnDemand]:
    machine = Machine(keep_events=100)
    machine.backend.copy_ns = setup.copy_ns
    nic = on_demand(machine, keep_alive_ns=setup.keep_alive_ns, max_faults=10**9)
    return run_churn(machine.clock, nic.attachment.buffer, nic, setup), machine, nic


def test_without_keep_alive_fences_the_importer_starves() -> None:
    result, *_ = run(replace(HARSH, keep_alive_ns=0))
    assert result.pieces == 0
    assert result.moves > 200
    assert result.longest_wait_ns >= HARSH.run_ns


def test_with_them_its_progress_has_a_floor_and_so_has_eviction() -> None:
    result, machine, nic = run(HARSH)
    assert nic.counters.refaults == 0
    assert HARSH.pieces_per_fault == 4
    assert result.pieces >= HARSH.floor > 200
    assert result.moves >= HARSH.rounds
    assert result.longest_wait_ns < 100_000
    machine.settle()


def test_a_bound_that_is_too_short_promises_nothing_and_a_little_more_does() -> None:
    short = replace(HARSH, keep_alive_ns=HARSH.fault_ns + HARSH.piece_ns)
    assert short.floor == 0
    assert run(short)[0].pieces == 0
    enough = replace(short, keep_alive_ns=short.keep_alive_ns + 1)
    assert enough.pieces_per_fault == 1
    assert run(enough)[0].pieces >= enough.floor > 0


# Times on a coarse grid, so that ends often fall together.
_STEPS = st.integers(1, 20).map(lambda steps: steps * 100)


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        Setup,
        move_gap_ns=_STEPS,
        copy_ns=_STEPS,
        fault_ns=_STEPS,
        piece_ns=_STEPS,
        pieces=st.integers(1, 8),
        keep_alive_ns=st.integers(0, 80).map(lambda steps: steps * 100),
        run_ns=st.just(100_000),
    )
)
def test_the_floor_holds_for_any_times(setup: Setup) -> None:
    result, machine, nic = run(setup)
    assert result.pieces >= setup.floor
    assert result.moves >= setup.rounds
    if setup.pieces_per_fault:  # then one transfer faults again no more often than that
        refaults = -(-setup.pieces // setup.pieces_per_fault) - 1
        assert nic.counters.refaults <= nic.counters.transfers * refaults
    machine.settle()
    assert machine.backend.held() == 1
