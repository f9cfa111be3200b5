# SPDX-License-Identifier: Apache-2.0
"""Buffers and attachments: what the devices then see of the bytes."""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Callable

import pytest

from guest_agent.p2p import rules
from guest_agent.p2p.addresses import DmaAddress, LinkAddress
from guest_agent.p2p.attachment import Attachment
from guest_agent.p2p.errors import (
    FaultError,
    NoPathError,
    ReachError,
    RuleError,
    StaleError,
    UnsupportedError,
)
from guest_agent.p2p.interconnect import Kind
from guest_agent.p2p.resv import locked
from guest_agent.p2p.rules import Task
from tests.unit.p2p.machines import DEVICE, SYSTEM, Machine, offer, tree

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
