# SPDX-License-Identifier: Apache-2.0
"""Moves: pipelined behind fences, for all importers or none, wholly or not at all."""

from __future__ import annotations

import errno

import pytest

from guest_agent.p2p import moves
from guest_agent.p2p.addresses import Address
from guest_agent.p2p.errors import (
    FenceFailedError,
    FutureError,
    NoRoomError,
    PinnedError,
    ReachError,
)
from guest_agent.p2p.fence import Fence, FenceContext
from guest_agent.p2p.resv import locked
from guest_agent.p2p.rules import Task
from tests.unit.p2p.machines import DEVICE, SYSTEM, Machine

NIC = Task("nic")


@pytest.fixture
def machine() -> Machine:
    return Machine()


# --- moves


def test_a_move_is_pipelined_and_nobody_gets_at_the_bytes_before_the_fence(
    machine: Machine,
) -> None:
    buffer = machine.export()
    attachment = machine.attach(buffer, "nic0.0")
    machine.write(machine.map(attachment), 0, b"payload")
    with locked(NIC, buffer.resv):
        moved = buffer.move(NIC, SYSTEM)
        mapping = attachment.map(NIC)  # handed out while the copy is queued
    assert not moved.is_signalled()
    assert mapping.is_future
    assert mapping.planned.user == "nic0.0"
    with pytest.raises(FutureError, match="DMA_RESV_USAGE_KERNEL"):
        _ = mapping.address
    seen: list[bytes] = []
    with locked(NIC, buffer.resv):
        done = attachment.submit(
            NIC,
            mapping,
            "read",
            lambda address: seen.append(machine.backend.read(address, 0, 7)),
            write=False,
        )
    assert seen == []
    done.wait(machine.clock)
    assert seen == [b"payload"]
    assert not mapping.is_future
    assert machine.read(mapping, 0, 7) == b"payload"
    assert machine.backend.held() == 1  # the old place was given back


def test_a_move_waits_for_what_is_under_way(machine: Machine) -> None:
    buffer = machine.export()
    attachment = machine.attach(buffer, "nic0.0", polite=False)
    mapping = machine.map(attachment)
    sending = Fence(FenceContext("nic0"), "send", 10**9)
    with locked(NIC, buffer.resv):
        attachment.submit(NIC, mapping, "send", lambda _: sending, write=False)
        buffer.move(NIC, SYSTEM)
    machine.clock.run(100_000)
    machine.core.graph.pump()
    assert machine.backend.copies == 0
    machine.backend.write(mapping.live.address, 0, b"last words")  # still allowed to
    sending.signal()
    machine.settle()
    machine.unmap(attachment, mapping)
    assert machine.read(machine.map(attachment), 0, 10) == b"last words"


def test_writers_wait_for_readers_and_readers_for_writers_only(machine: Machine) -> None:
    buffer = machine.export()
    attachment = machine.attach(buffer, "nic0.0")
    mapping, began = machine.map(attachment), list[str]()
    gates = {name: Fence(FenceContext(name), name, 10**9) for name in ("r1", "r2", "w")}

    def queue(name: str, write: bool) -> None:
        def begin(_: Address) -> Fence:
            began.append(name)
            return gates[name]

        with locked(NIC, buffer.resv):
            attachment.submit(NIC, mapping, name, begin, write=write)

    queue("r1", False)
    queue("r2", False)
    queue("w", True)
    assert began == ["r1", "r2"]
    gates["r1"].signal()
    machine.core.graph.pump()
    assert began == ["r1", "r2"]
    gates["r2"].signal()
    machine.core.graph.pump()
    assert began == ["r1", "r2", "w"]


def test_a_pinned_buffer_stays_and_full_memory_names_who_pins_it(machine: Machine) -> None:
    machine = Machine(vram_bytes=16384)
    buffer = machine.export("big", 12288)
    attachment = machine.attach(buffer, "nic0.0")
    with locked(NIC, buffer.resv):
        attachment.pin(NIC)
        with pytest.raises(PinnedError, match=r"big is pinned by nic0\.0"):
            buffer.move(NIC, SYSTEM)
    with pytest.raises(NoRoomError, match=r"big \(12288 bytes\) by nic0\.0"):
        machine.export("more", 8192, placements=(DEVICE,))
    assert machine.export("spilled", 8192).placement is SYSTEM


def test_a_static_importer_pins_for_as_long_as_it_maps(machine: Machine) -> None:
    buffer = machine.export()
    static = machine.attach(buffer, "nic0.0", dynamic=False)
    machine.settle()
    mapping = machine.map(static)
    with pytest.raises(PinnedError):
        machine.move(buffer, SYSTEM)
    machine.unmap(static, mapping)
    machine.move(buffer, SYSTEM)


def test_a_list_of_buffers_moves_wholly_or_not_at_all(machine: Machine) -> None:
    machine = Machine(vram_bytes=3 * 8192)
    buffers = [machine.export(f"b{n}") for n in range(4)]
    assert [b.placement for b in buffers] == [DEVICE, DEVICE, DEVICE, SYSTEM]
    locks = [b.resv for b in buffers]
    with locked(NIC, *locks):
        moves.move_all(NIC, [(b, SYSTEM) for b in buffers[:3]])
    machine.settle()
    held = machine.backend.held()
    with locked(NIC, *locks), pytest.raises(NoRoomError, match="b3"):
        moves.move_all(NIC, [(b, DEVICE) for b in buffers])
    assert [b.placement for b in buffers] == [SYSTEM] * 4
    assert machine.backend.held() == held
    with locked(NIC, *locks):
        moves.move_all(NIC, [(b, DEVICE) for b in buffers[:3]])
    machine.settle()
    assert [b.placement for b in buffers] == [DEVICE, DEVICE, DEVICE, SYSTEM]


def test_a_copy_that_fails_is_known_to_everyone_who_looks(machine: Machine) -> None:
    buffer = machine.export()
    attachment = machine.attach(buffer, "nic0.0")
    machine.backend.copy_error = OSError(errno.EIO, "engine halted")
    with locked(NIC, buffer.resv):
        buffer.move(NIC, SYSTEM)
        mapping = attachment.map(NIC)
        done = attachment.submit(NIC, mapping, "read", lambda _: None, write=False)
    with pytest.raises(FenceFailedError):
        done.wait(machine.clock)
    with pytest.raises(FenceFailedError, match="engine halted"):
        _ = mapping.address
    with pytest.raises(FenceFailedError, match="engine halted"):
        machine.map(attachment)


def test_what_happened_can_be_told_from_the_events(machine: Machine) -> None:
    buffer = machine.export()
    machine.map(machine.attach(buffer, "nic0.0"))
    machine.move(buffer, SYSTEM)
    machine.settle()
    events = {event.kind: event for event in machine.core.events.events()}
    move, invalidate, fence = (events[kind] for kind in ("move", "invalidate", "fence"))
    assert invalidate.parent == move.number
    assert fence.cause == move.number
    assert fence.time_ns == move.time_ns + machine.backend.copy_ns
    assert move.details["way"] == "buf0: device → system"


def test_a_chapter_is_the_parent_of_what_has_no_other(machine: Machine) -> None:
    events = machine.core.events
    first = events.chapter("test", "one")
    machine.attach(machine.export(), "nic0.0")
    second = events.chapter("test", "two")
    alone = events.note("map", "later")
    found = {event.number: event for event in events.events()}
    attach = next(event for event in found.values() if event.kind == "attach")
    negotiate = next(event for event in found.values() if event.kind == "negotiate")
    assert (attach.parent, negotiate.parent) == (first, attach.number)
    assert (found[second].parent, found[alone].parent) == (0, second)
    assert found[first].cause == found[attach.number].cause == 0


def test_what_someone_else_has_is_forgotten(machine: Machine) -> None:
    events = machine.core.events
    numbers = [events.note("map", str(n)) for n in range(10)]
    events.forget(numbers[3])
    assert [event.number for event in events.events()] == numbers[4:]
    events.forget(0)
    assert len(events.events()) == 6
    assert events.dropped == 0


def test_what_a_move_asks_is_a_part_of_its_preparation(machine: Machine) -> None:
    buffer = machine.export()
    machine.map(machine.attach(buffer, "nic0.0"))
    machine.move(buffer, SYSTEM)
    machine.settle()
    events = {event.kind: event for event in machine.core.events.events()}
    assert events["negotiate"].parent == events["prepare"].number
    assert events["move"].cause == events["prepare"].number
    assert events["fence"].details["took_ns"] == machine.backend.copy_ns


def test_an_address_that_cannot_be_mapped_is_given_back(machine: Machine) -> None:
    attachment = machine.attach(machine.export(), "nic0.0")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(22, "the IOMMU takes no such address")

    plain, machine.backend.map = machine.backend.map, refuse  # type: ignore[method-assign]
    with pytest.raises(ReachError, match=r"nic0\.0 offered"):
        machine.map(attachment)
    assert machine.backend.reserved() == 0
    machine.backend.map = plain  # type: ignore[method-assign]
    machine.map(attachment)
    assert machine.backend.reserved() == 1


def test_a_fence_of_an_access_names_who_submitted_it(machine: Machine) -> None:
    attachment = machine.attach(machine.export(), "nic0.0")
    mapping = machine.map(attachment)
    fence = Fence(FenceContext("engine"), "dma", 10**9)
    with locked(NIC, attachment.buffer.resv):
        attachment.submit(NIC, mapping, "dma", lambda _: fence, write=False)
    fence.signal()
    machine.settle()
    events = {event.kind: event for event in machine.core.events.events()}
    assert events["submit"].details["what"] == "read dma"
    assert events["fence"].cause == events["submit"].number
