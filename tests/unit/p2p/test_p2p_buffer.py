# SPDX-License-Identifier: Apache-2.0
"""Buffers, attachments, moves and revocation: what the devices then see of the bytes."""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Callable

import pytest

from guest_agent.p2p import moves, revoke, rules
from guest_agent.p2p.addresses import Address, DmaAddress, FabricAddress, LinkAddress
from guest_agent.p2p.attachment import Attachment, Mapping
from guest_agent.p2p.backend import Backing
from guest_agent.p2p.errors import (
    FaultError,
    FenceFailedError,
    FutureError,
    NoPathError,
    NoRoomError,
    OverdueError,
    PinnedError,
    ReachError,
    RevokedError,
    RuleError,
    StaleError,
    UnsupportedError,
)
from guest_agent.p2p.fence import Fence, FenceContext
from guest_agent.p2p.interconnect import Kind, Path
from guest_agent.p2p.resv import Usage, locked
from guest_agent.p2p.rules import Task
from tests.unit.p2p.machines import DEVICE, SYSTEM, Machine, gpu_offers, offer, tree

NIC = Task("nic")


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_link_and_dma_importers_share_one_buffer_and_its_bytes(machine: Machine) -> None:
    buffer = machine.export()
    by_link = machine.attach(buffer, "gpu1")
    by_pcie = machine.attach(buffer, "gpu2")
    one, other = machine.map(by_link), machine.map(by_pcie)
    assert isinstance(one.address, LinkAddress)
    assert isinstance(other.address, DmaAddress)
    machine.write(one, 100, b"over the link")
    assert machine.read(other, 100, 13) == b"over the link"
    machine.write(other, 200, b"over pcie")
    assert machine.read(one, 200, 9) == b"over pcie"
    assert buffer.placement is DEVICE


def test_two_importers_have_two_addresses_and_neither_has_the_other_s(machine: Machine) -> None:
    buffer = machine.export()
    mappings = [machine.map(machine.attach(buffer, name)) for name in ("gpu2", "nic0.0")]
    first, second = (mapping.address for mapping in mappings)
    assert first.value != second.value
    with pytest.raises(FaultError):
        machine.backend.read(DmaAddress(first.value, second.user), 0, 1)


def test_the_address_is_stable_until_a_move(machine: Machine) -> None:
    buffer = machine.export()
    attachment = machine.attach(buffer, "nic0.0")
    first, again = machine.map(attachment), machine.map(attachment)
    address = first.address
    assert again.address == address
    machine.unmap(attachment, first)
    machine.unmap(attachment, again)
    with pytest.raises(FaultError):
        machine.backend.read(address, 0, 1)
    other = machine.map(machine.attach(buffer, "nic0.0"))
    assert other.address != address  # nobody else gets it in between
    assert machine.map(attachment).address == address
    machine.move(buffer, SYSTEM)
    machine.settle()
    machine.map(attachment)


def test_a_read_only_mapping_cannot_be_written_through(machine: Machine) -> None:
    attachment = machine.attach(machine.export(), "nic0.0")
    mapping = machine.map(attachment, writable=False)
    assert machine.read(mapping, 0, 4) == bytes(4)
    with pytest.raises(FaultError):
        machine.write(mapping, 0, b"x")
    with locked(NIC, attachment.buffer.resv), pytest.raises(UnsupportedError):
        attachment.submit(NIC, mapping, "send", lambda _: None, write=True)
    with pytest.raises(UnsupportedError):
        machine.map(attachment)


# --- placement and attach


def test_a_later_importer_that_reaches_only_ram_moves_the_buffer_for_all(machine: Machine) -> None:
    machine = Machine(tree(no_host_bridge=True))
    buffer = machine.export()
    gpu1 = machine.attach(buffer, "gpu1")
    mapping = machine.map(gpu1)
    machine.write(mapping, 0, b"before")
    disk = machine.attach(buffer, "disk")
    machine.settle()
    assert buffer.placement is SYSTEM
    assert gpu1.path.kind is Kind.SYSTEM
    assert machine.read(machine.map(disk), 0, 6) == b"before"
    assert machine.read(machine.map(gpu1), 0, 6) == b"before"
    with pytest.raises(StaleError):
        _ = mapping.address


def test_it_is_refused_if_one_cannot_follow(machine: Machine) -> None:
    machine = Machine(tree(no_host_bridge=True))
    buffer = machine.export()
    only_link = [offer(Kind.XGMI, "gpu1", "x01")]
    gpu1 = machine.attach(buffer, "gpu1", offers=only_link)
    mapping = machine.map(gpu1)
    with pytest.raises(NoPathError) as refused:
        machine.attach(buffer, "disk")
    why = [each.reason for each in refused.value.report.candidates()]
    assert "active importers do not reach system memory" in why
    assert machine.read(mapping, 0, 1) == b"\0"
    assert [each.importer.name for each in buffer.attachments] == ["gpu1"]


def test_a_pinned_buffer_is_not_moved_for_a_newcomer(machine: Machine) -> None:
    machine = Machine(tree(no_host_bridge=True))
    buffer = machine.export()
    gpu1 = machine.attach(buffer, "gpu1")
    with locked(NIC, buffer.resv):
        gpu1.pin(NIC)
    with pytest.raises(NoPathError):
        machine.attach(buffer, "disk")
    with locked(NIC, buffer.resv):
        gpu1.unpin(NIC)
        with pytest.raises(StaleError):
            gpu1.unpin(NIC)
    machine.attach(buffer, "disk")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"dynamic": False}, "is static"),
        ({"revocable": False}, "is not revocable"),
        ({"offers": (offer(Kind.SYSTEM, "nic0.0"),)}, "does no peer-to-peer"),
    ],
)
def test_a_peer_to_peer_only_exporter_refuses_and_a_gpu_moves_to_ram(
    machine: Machine, how: dict[str, object], why: str
) -> None:
    only_device = machine.export("vfio", placements=(DEVICE,))
    with pytest.raises(UnsupportedError, match=why) as error:
        machine.attach(only_device, "nic0.0", **how)
    assert error.value.errno == errno.EOPNOTSUPP
    buffer = machine.export("gpu buffer")
    attachment = machine.attach(buffer, "nic0.0", **how)
    machine.settle()
    assert buffer.placement is SYSTEM
    assert machine.read(machine.map(attachment), 0, 2) == b"\0\0"


def test_an_importer_that_lies_about_its_reach_is_named_and_the_others_go_on(
    machine: Machine,
) -> None:
    buffer = machine.export()
    honest, liar = machine.attach(buffer, "gpu2"), machine.attach(buffer, "nic0.0")
    machine.backend.liars.add("nic0.0")
    with pytest.raises(ReachError, match=r"nic0\.0 offered") as error:
        machine.map(liar)
    assert error.value.importer == "nic0.0"
    machine.write(machine.map(honest), 0, b"fine")
    assert machine.backend.mapped() == 1


def test_a_link_that_is_down_is_not_chosen_and_not_mapped(machine: Machine) -> None:
    buffer = machine.export()
    attached_before = machine.attach(buffer, "gpu1")
    machine.backend.broken["x01"] = "link x01 is down"
    with pytest.raises(ReachError, match="link x01 is down"):
        machine.map(attached_before)
    assert machine.attach(buffer, "gpu1").path.kind is Kind.PCIE


# --- locking


def test_the_locking_convention_is_checked(machine: Machine) -> None:
    buffer = machine.export()
    attachment = machine.attach(buffer, "nic0.0")
    mapping = machine.map(attachment)
    call: Callable[[], object]
    for call in (
        lambda: attachment.map(NIC),
        lambda: attachment.unmap(NIC, mapping),
        lambda: attachment.pin(NIC),
        lambda: attachment.unpin(NIC),
        lambda: attachment.submit(NIC, mapping, "x", lambda _: None, write=False),
    ):
        with pytest.raises(RuleError, match=r"buf0.*locking convention") as error:
            call()
        assert error.value.rule is rules.LOCKED
    for call in (lambda: buffer.move(NIC, SYSTEM), lambda: buffer.invalidate(NIC)):
        with pytest.raises(RuleError) as error:
            call()
        assert error.value.rule is rules.EXPORTER_LOCKED
    with locked(NIC, buffer.resv):
        unlocked: tuple[Callable[[], object], ...] = (
            lambda: buffer.attach(NIC, machine.importer("gpu2")),
            lambda: buffer.detach(NIC, attachment),
            lambda: buffer.unrevoke(NIC),
            lambda: buffer.release(NIC),
        )
        for call in unlocked:
            with pytest.raises(RuleError) as error:
                call()
            assert error.value.rule is rules.UNLOCKED
        with pytest.raises(RuleError) as error:
            buffer.revoke(NIC, "reset")
        assert error.value.rule is rules.WAIT_UNLOCKED
    assert machine.read(mapping, 0, 1) == b"\0"
    assert not buffer.revoked


def test_only_dynamic_importers_pin_and_none_maps_in_its_callback(machine: Machine) -> None:
    buffer = machine.export()
    static = machine.attach(buffer, "nic0.0", dynamic=False)
    machine.settle()
    with locked(NIC, buffer.resv), pytest.raises(RuleError) as error:
        static.pin(NIC)
    assert error.value.rule is rules.PIN_DYNAMIC
    caught: list[RuleError] = []

    def remap(task: Task, attachment: Attachment) -> None:
        try:
            attachment.map(task)
        except RuleError as broken:
            caught.append(broken)

    eager = machine.attach(buffer, "gpu2", during=remap)
    machine.map(eager)
    machine.move(buffer, SYSTEM)
    assert [broken.rule for broken in caught] == [rules.MAP_AFTERWARDS]


# --- unmapping


def test_unmapped_twice_or_by_another_is_an_error_and_the_others_go_on(machine: Machine) -> None:
    buffer = machine.export()
    one, two = machine.attach(buffer, "gpu2"), machine.attach(buffer, "nic0.0")
    mine, theirs = machine.map(one), machine.map(two)
    address = mine.address
    machine.unmap(one, mine)
    with pytest.raises(StaleError, match="unmapped twice"):
        machine.unmap(one, mine)
    with pytest.raises(StaleError, match="none of this attachment"):
        machine.unmap(one, theirs)
    with pytest.raises(FaultError):
        machine.backend.read(address, 0, 1)
    machine.write(theirs, 0, b"x")
    with pytest.raises(StaleError, match="after it was unmapped"):
        _ = mine.planned


def test_detach_and_release_want_everything_given_back(machine: Machine) -> None:
    buffer = machine.export()
    attachment = machine.attach(buffer, "nic0.0")
    mapping = machine.map(attachment)
    with pytest.raises(StaleError, match="1 mappings"):
        buffer.detach(NIC, attachment)
    machine.unmap(attachment, mapping)
    with pytest.raises(StaleError, match="still attached"):
        buffer.release(NIC)
    buffer.detach(NIC, attachment)
    with pytest.raises(StaleError):
        buffer.detach(NIC, attachment)
    buffer.release(NIC)
    assert machine.backend.held() == 0
    assert not machine.core.buffers


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
    by_link, by_pcie = machine.attach(buffer, "gpu1"), machine.attach(buffer, "gpu2")
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


# --- scale


@pytest.mark.slow
def test_ten_thousand_cycles_leave_nothing_behind() -> None:
    machine = Machine(keep_events=100)
    buffer = machine.export(size_bytes=4096)
    importers = [machine.importer(name) for name in ("gpu1", "nic0.0", "disk")]

    def cycle(n: int) -> None:
        attachment = buffer.attach(NIC, importers[n % 3])
        mapping = machine.map(attachment)
        machine.move(buffer, (SYSTEM, DEVICE)[n % 2])
        machine.settle()
        assert mapping.closed
        machine.unmap(attachment, machine.map(attachment))
        buffer.detach(NIC, attachment)

    for n in range(300):
        cycle(n)
    gc.collect()
    before = sys.getallocatedblocks()
    for n in range(10_000):
        cycle(n)
    gc.collect()
    assert sys.getallocatedblocks() - before < 500
    assert machine.backend.held() == 1
    assert machine.backend.mapped() == 0
    assert machine.backend.reserved() == 0
    assert len(machine.core.graph) == 0
    assert len(buffer.resv) <= 2
