# SPDX-License-Identifier: Apache-2.0
"""Importers that misbehave, memory that is taken away, paths that are lost: the others go on."""

from __future__ import annotations

import errno

import pytest

from guest_agent.p2p import revoke
from guest_agent.p2p.addresses import Address, FabricAddress
from guest_agent.p2p.attachment import Attachment, Mapping
from guest_agent.p2p.backend import Backing
from guest_agent.p2p.errors import (
    FaultError,
    FenceFailedError,
    NoPathError,
    OverdueError,
    ReachError,
    RevokedError,
    StaleError,
)
from guest_agent.p2p.fence import Fence, FenceContext
from guest_agent.p2p.interconnect import Kind, Path
from guest_agent.p2p.resv import Usage, locked
from guest_agent.p2p.rules import Task
from tests.unit.p2p.machines import SYSTEM, Machine, gpu_offers, offer

NIC = Task("nic")


@pytest.fixture
def machine() -> Machine:
    return Machine()


# --- importers that misbehave


def test_an_importer_that_never_unmaps_is_named_after_its_time(machine: Machine) -> None:
    buffer = machine.export()
    rude = machine.attach(buffer, "nic0.0", polite=False)
    kind = machine.attach(buffer, "gpu2")
    mapping, other = machine.map(rude), machine.map(kind)
    address = mapping.live.address
    machine.write(other, 0, b"moved")
    machine.move(buffer, SYSTEM)
    machine.settle()
    with pytest.raises(StaleError, match="invalidated"):
        _ = mapping.address
    with locked(NIC, buffer.resv):
        with pytest.raises(StaleError, match="invalidated"):
            rude.submit(NIC, mapping, "send", lambda _: None, write=False)
        revoke.enforce(buffer, NIC)  # not late yet
    machine.clock.run(machine.clock.now_ns() + machine.core.unmap_timeout_ns)
    assert revoke.overdue(buffer) == ["nic0.0"]
    with locked(NIC, buffer.resv), pytest.raises(OverdueError, match=r"nic0\.0") as error:
        revoke.enforce(buffer, NIC)
    assert error.value.importers == ("nic0.0",)
    with pytest.raises(FaultError):
        machine.backend.read(address, 0, 1)
    assert machine.read(machine.map(kind), 0, 5) == b"moved"
    assert machine.backend.held() == 1
    assert machine.read(machine.map(rude), 0, 5) == b"moved"


def test_an_importer_that_dies_with_a_fence_holds_nobody_up(machine: Machine) -> None:
    buffer = machine.export()
    dead, alive = machine.attach(buffer, "nic0.0"), machine.attach(buffer, "gpu2")
    mapping = machine.map(dead)
    address = mapping.address
    never = Fence(FenceContext("nic0"), "send", 10**12)
    with locked(NIC, buffer.resv):
        sending = dead.submit(NIC, mapping, "send", lambda _: never, write=True)
        moved = buffer.move(NIC, SYSTEM)
    machine.clock.run(10_000)
    assert not moved.is_signalled()
    buffer.importer_died(Task("core"), dead, "process killed")
    machine.settle()
    moved.wait(machine.clock)
    with pytest.raises(FenceFailedError, match=r"nic0\.0 died"):
        sending.wait(machine.clock)
    with pytest.raises(FaultError):
        machine.backend.read(address, 0, 1)
    assert machine.read(machine.map(alive), 0, 1) == b"\0"
    never.signal()  # a late word of the device harms nothing
    assert buffer.attachments == [alive]


def test_a_callback_that_raises_keeps_nobody_from_being_told(machine: Machine) -> None:
    buffer = machine.export()

    def broken(task: Task, attachment: Attachment) -> None:
        raise ValueError("importer bug")

    machine.attach(buffer, "nic0.0", during=broken)
    machine.attach(buffer, "gpu2")
    machine.move(buffer, SYSTEM)
    assert machine.told == ["nic0.0", "gpu2"]
    errors = [event.error for event in machine.core.events.events() if event.error]
    assert errors == ["ValueError: importer bug"]


# --- revocation


def test_revoke_takes_the_memory_away_and_unrevoke_gives_it_back(machine: Machine) -> None:
    buffer = machine.export()
    attachment = machine.attach(buffer, "nic0.0")
    mapping = machine.map(attachment)
    machine.write(mapping, 0, b"kept")
    address = mapping.address
    buffer.revoke(machine.exporter, "function reset")
    with pytest.raises(FaultError):
        machine.backend.read(address, 0, 1)
    with pytest.raises(RevokedError, match="function reset") as error:
        machine.map(attachment)
    assert error.value.errno == errno.ENODEV
    with pytest.raises(RevokedError):
        machine.attach(buffer, "gpu2")
    with pytest.raises(RevokedError):
        machine.move(buffer, SYSTEM)
    buffer.unrevoke(machine.exporter)
    assert machine.read(machine.map(attachment), 0, 4) == b"kept"


def test_revoke_waits_for_bookkeeping_fences(machine: Machine) -> None:
    buffer = machine.export()

    def slow(task: Task, attachment: Attachment) -> None:
        flush = Fence(FenceContext("nic0"), "flush translations", 10**12)
        buffer.add_fence(task, attachment, flush, Usage.BOOKKEEP)
        machine.clock.after(7000, flush.signal)
        for mapping in list(attachment.mappings.values()):
            attachment.unmap(task, mapping)

    machine.map(machine.attach(buffer, "nic0.0", during=slow))
    buffer.revoke(machine.exporter, "close")
    assert machine.clock.now_ns() == 7000


def test_revoke_names_who_does_not_let_go_and_takes_it_away(machine: Machine) -> None:
    buffer = machine.export()
    rude = machine.attach(buffer, "nic0.0", polite=False)
    machine.map(machine.attach(buffer, "gpu2"))
    stuck = machine.attach(buffer, "gpu1")
    address = machine.map(rude).address
    with locked(NIC, buffer.resv):
        buffer.add_fence(NIC, stuck, Fence(FenceContext("gpu1"), "job", 10**15), Usage.READ)
    with pytest.raises(OverdueError) as error:
        buffer.revoke(machine.exporter, "memory decoding off")
    assert error.value.importers == ("gpu1", "nic0.0")
    assert machine.clock.now_ns() == machine.core.unmap_timeout_ns
    with pytest.raises(FaultError):
        machine.backend.read(address, 0, 1)
    assert machine.backend.mapped() == 0


def test_an_importer_that_cannot_be_told_is_named_by_revoke(machine: Machine) -> None:
    buffer = machine.export()
    pinned = machine.attach(buffer, "nic0.0", revocable=False)
    machine.settle()
    machine.map(pinned)
    with pytest.raises(OverdueError, match=r"nic0\.0"):
        buffer.revoke(machine.exporter, "hot unplug")
    assert machine.backend.mapped() == 0


# --- falling back, and paths that are lost


def test_a_path_that_cannot_be_mapped_is_left_for_the_next_down_to_the_scatter_list(
    machine: Machine,
) -> None:
    kinds = [Kind.XGMI, Kind.PCIE, Kind.SCATTER_LIST]
    buffer = machine.export(
        offers=[offer(kind, "gpu0", "x01" if kind is Kind.XGMI else "") for kind in kinds]
    )
    theirs = [offer(kind, "gpu1", "x01" if kind is Kind.XGMI else "") for kind in kinds]
    attachment = machine.attach(buffer, "gpu1", offers=theirs)
    broken = {Kind.XGMI, Kind.PCIE}
    plain = machine.backend.map

    def map_(backing: Backing, path: Path, address: Address, *, writable: bool) -> None:
        if path.kind in broken:
            raise OSError(errno.EIO, f"no {path.kind.value}")
        plain(backing, path, address, writable=writable)

    machine.backend.map = map_  # type: ignore[method-assign]
    with locked(NIC, buffer.resv):
        mapping = attachment.map_or_fall_back(NIC)
    assert attachment.path.kind is Kind.SCATTER_LIST
    machine.write(mapping, 0, b"legacy")
    assert machine.read(mapping, 0, 6) == b"legacy"
    machine.unmap(attachment, mapping)
    broken.add(Kind.SCATTER_LIST)
    with locked(NIC, buffer.resv), pytest.raises(NoPathError) as none:
        attachment.map_or_fall_back(NIC)
    why = {each.reason for each in none.value.report.candidates()}
    assert why == {"it was tried, and mapping failed"}
    assert machine.backend.mapped() == 0


def test_a_window_that_is_pulled_out_under_load_fails_what_is_queued_and_nothing_else(
    machine: Machine,
) -> None:
    fabric = offer(Kind.UAL_VIRTUAL, "gpu0")
    buffer = machine.export(offers=[fabric, *gpu_offers("gpu0")])
    remote = machine.attach(buffer, "gpu2", offers=[offer(Kind.UAL_VIRTUAL, "gpu2")])
    local = machine.attach(buffer, "nic0.0")
    window, plain = machine.map(remote), machine.map(local)
    assert isinstance(window.address, FabricAddress)
    gate = Fence(FenceContext("gpu2"), "first job", 10**9)

    def queue(attachment: Attachment, mapping: Mapping, first: bool) -> Fence:
        def begin(address: Address) -> Fence | None:
            machine.backend.write(address, 0, b"job")
            return gate if first else None

        with locked(NIC, buffer.resv):
            return attachment.submit(NIC, mapping, "job", begin, write=True)

    running, queued = queue(remote, window, True), queue(remote, window, False)
    after = queue(local, plain, False)
    machine.backend.broken["ual-virtual"] = "the window was pulled out"
    told = revoke.path_lost(
        machine.core, machine.exporter, lambda path: path.kind is Kind.UAL_VIRTUAL, "node1 left"
    )
    assert told == ["gpu2 on buf0"]
    gate.signal()
    machine.settle()
    running.wait(machine.clock)
    with pytest.raises(FenceFailedError, match="nothing there"):
        queued.wait(machine.clock)
    after.wait(machine.clock)
    assert machine.read(plain, 0, 3) == b"job"
    with pytest.raises(ReachError, match="pulled out"):
        machine.map(remote)
    del machine.backend.broken["ual-virtual"]
    assert machine.read(machine.map(remote), 0, 3) == b"job"


def test_a_link_that_goes_down_is_told_to_those_who_used_it_only(machine: Machine) -> None:
    buffer = machine.export()
    by_link, by_pcie = machine.attach(buffer, "gpu1", polite=False), machine.attach(buffer, "gpu2")
    one, other = machine.map(by_link), machine.map(by_pcie)
    machine.write(one, 0, b"before")
    address = one.address
    machine.backend.broken["x01"] = "link x01 is down"
    told = revoke.path_lost(
        machine.core, machine.exporter, lambda path: path.exporter.port == "x01", "link down"
    )
    assert told == ["gpu1 on buf0"]
    assert machine.told == ["gpu1"]
    with pytest.raises(FaultError):
        machine.backend.read(address, 0, 1)
    assert machine.read(other, 0, 6) == b"before"
    with pytest.raises(ReachError, match="x01 is down"):
        machine.map(by_link)
    with locked(NIC, buffer.resv):
        assert buffer.renegotiate(NIC, by_link).kind is Kind.PCIE  # falls back
    fallen = machine.map(by_link)
    assert machine.read(fallen, 0, 6) == b"before"
    del machine.backend.broken["x01"]
    with locked(NIC, buffer.resv), pytest.raises(StaleError, match="keeps its path"):
        buffer.renegotiate(NIC, by_link)
    machine.unmap(by_link, fallen)
    with locked(NIC, buffer.resv):
        assert buffer.renegotiate(NIC, by_link).kind is Kind.XGMI
    assert machine.read(machine.map(by_link), 0, 6) == b"before"
