# SPDX-License-Identifier: Apache-2.0
"""The server side of vfio-user against the client's side of it, over a real socket."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from testbed.models import server, wire
from testbed.models.control import Control
from testbed.models.listener import Listener
from testbed.models.memory import MemoryCache, SharedMemory
from testbed.models.testing import FakeQemu
from testbed.models.wire import Command, HeaderFlag, Irq, IrqSetFlag
from testbed.models.witness import Event
from testbed.models.witness import Path as Way
from tests.contract.vfio_user_client import PAGE, refusal
from tests.unit.models.model_devices import BAR_BYTES, Card


class TestDescription:
    def test_device(self, qemu: FakeQemu) -> None:
        reply, _ = qemu.call(
            Command.DEVICE_GET_INFO, wire.DEVICE_INFO.encode(wire.DeviceInfo(16, 0, 0, 0))
        )
        info = wire.DEVICE_INFO.decode(reply)
        assert info == (16, wire.DeviceFlag.RESET | wire.DeviceFlag.PCI, 9, 5)

    def region(self, qemu: FakeQemu, index: int, argsz: int = 32) -> tuple[bytes, list[int]]:
        request = wire.RegionInfo(argsz, 0, index, 0, 0, 0)
        return qemu.call(Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.encode(request))

    def test_regions(self, qemu: FakeQemu) -> None:
        sizes = []
        for index in range(9):
            reply, fds = self.region(qemu, index)
            sizes.append(wire.REGION_INFO.decode(reply).size)
            assert not fds
        assert sizes == [BAR_BYTES, 0, 0, 0, 0, 0, 0, 4096, 0]

    def test_no_such_region(self, qemu: FakeQemu) -> None:
        request = wire.RegionInfo(32, 0, 9, 0, 0, 0)
        payload = wire.REGION_INFO.encode(request)
        assert refusal(qemu, Command.DEVICE_GET_REGION_INFO, payload) == errno.EINVAL

    def test_memory_behind_a_bar_is_handed_out(self) -> None:
        memory = SharedMemory.create(1 << 20, name="own")
        with FakeQemu(Card(memory=memory)) as qemu:
            reply, (fd,) = self.region(qemu, 2)
            assert wire.REGION_INFO.decode(reply).flags & wire.RegionFlag.MMAP
            os.pwrite(fd, b"there", 100)
            os.close(fd)
            assert bytes(memory.view[100:105]) == b"there"
            assert qemu.read(2, 100, 1) == ord("t")
            qemu.write(2, 100, ord("w"), 1)
            assert bytes(memory.view[100:105]) == b"where"

    def test_irqs(self, qemu: FakeQemu) -> None:
        counts = {}
        for kind in Irq:
            request = wire.IRQ_INFO.encode(wire.IrqInfo(16, 0, kind, 0))
            reply, _ = qemu.call(Command.DEVICE_GET_IRQ_INFO, request)
            counts[kind] = wire.IRQ_INFO.decode(reply).total
        assert counts == {Irq.INTX: 0, Irq.MSI: 0, Irq.MSIX: 8, Irq.ERR: 1, Irq.REQ: 0}
        request = wire.IRQ_INFO.encode(wire.IrqInfo(16, 0, 5, 0))
        assert refusal(qemu, Command.DEVICE_GET_IRQ_INFO, request) == errno.EINVAL

    def test_what_the_server_cannot_do(self, qemu: FakeQemu) -> None:
        assert (
            refusal(qemu, Command.DEVICE_FEATURE, wire.FEATURE.encode(wire.Feature(8, 1)))
            == errno.ENOTTY
        )
        assert refusal(qemu, 17, b"") == errno.ENOSYS


class TestRegisters:
    def test_sizes(self, qemu: FakeQemu) -> None:
        for size in (1, 2, 4, 8):
            value = int.from_bytes(bytes(range(1, size + 1)), "little")
            qemu.write(0, 8 * size, value, size)
            assert qemu.read(0, 8 * size, size) == value

    @pytest.mark.parametrize(
        ("region", "offset", "size"),
        [
            (0, BAR_BYTES, 4),
            (0, BAR_BYTES - 2, 4),
            (0, 2, 4),
            (0, 0, 3),
            (0, 0, 0),
            (0, 0, 16),
            (0, (1 << 64) - 4, 4),
            (1, 0, 4),
            (6, 0, 4),
            (7, 4096, 1),
            (7, 4095, 2),
            (99, 0, 4),
        ],
    )
    def test_no_such_register(self, qemu: FakeQemu, region: int, offset: int, size: int) -> None:
        access = wire.REGION_ACCESS.encode(wire.RegionAccess(offset, region, size))
        assert refusal(qemu, Command.REGION_READ, access) == errno.EINVAL
        assert refusal(qemu, Command.REGION_WRITE, access + bytes(size)) == errno.EINVAL

    def test_a_write_with_too_little_data(self, qemu: FakeQemu) -> None:
        access = wire.REGION_ACCESS.encode(wire.RegionAccess(0, 0, 4))
        assert refusal(qemu, Command.REGION_WRITE, access + b"abc") == errno.EINVAL

    def test_posted_and_coalesced_writes_come_first(self, qemu: FakeQemu) -> None:
        device = qemu.device
        assert isinstance(device, Card)
        access = wire.REGION_ACCESS.encode(wire.RegionAccess(0x10, 0, 4))
        head = wire.encode_header(1, Command.REGION_WRITE, 20, HeaderFlag.NO_REPLY)
        many = wire.encode_write_multi(
            [(wire.RegionAccess(8 * n, 0, 8), n.to_bytes(8, "little")) for n in range(10, 20)]
        )
        head2 = wire.encode_header(2, Command.REGION_WRITE_MULTI, len(many), HeaderFlag.NO_REPLY)
        qemu.send_raw(head + access + b"\7\0\0\0" + head2 + many)
        assert qemu.read(0, 0x10) == 7
        assert [qemu.read(0, 8 * n, 8) for n in range(10, 20)] == list(range(10, 20))

    def test_a_bug_in_the_model_is_that_device_s_failure(
        self, qemu: FakeQemu, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert qemu.read(0, 0x110) == 0
        qemu.write(0, 0x110, 1)
        assert qemu.device.failure is not None
        assert qemu.device.failure.what == "ZeroDivisionError: a bug"
        assert "model_devices.py" in qemu.device.failure.where
        listener = Listener(qemu.device, tmp_path / "card.vfu", MemoryCache())
        told = Control({"card": listener}).call("devices", {})
        failure = {"where": qemu.device.failure.where, "what": "ZeroDivisionError: a bug"}
        assert isinstance(told, list)
        assert isinstance(told[0], dict)
        assert told[0]["failure"] == failure
        listener.close()
        assert qemu.device.witness.count(Event.MODEL_ERROR) == 2
        assert capsys.readouterr().err.count("ZeroDivisionError") == 1
        qemu.write(0, 0x20, 5)
        assert qemu.read(0, 0x20) == 5


class TestDma:
    def copy(self, qemu: FakeQemu, source: int, target: int) -> Card:
        device = qemu.device
        assert isinstance(device, Card)
        qemu.write(0, 0, target, 8)
        qemu.write(0, 0x100, source, 8)
        return device

    def test_through_mappings(self, qemu: FakeQemu) -> None:
        a = qemu.add_memory(0x10000, PAGE)
        b = qemu.add_memory(1 << 40, PAGE)
        a.view[:0x20] = bytes(range(0x20))
        device = self.copy(qemu, 0x10000, (1 << 40) + 0x100)
        qemu.wait(lambda: device.copies == 1)
        assert bytes(b.view[0x100:0x120]) == bytes(range(0x20))
        assert device.witness.bytes_by(Way.IOMMU, write=True) == 0x20

    def test_by_message(self, qemu: FakeQemu) -> None:
        a = qemu.add_message_memory(0x10000, PAGE)
        a.view[:0x20] = bytes(range(0x20))
        device = self.copy(qemu, 0x10000, 0x10800)
        qemu.wait(lambda: device.copies == 1)
        assert bytes(a.view[0x800:0x820]) == bytes(range(0x20))
        assert device.witness.bytes_by(Way.MESSAGE, write=False) == 0x20
        assert device.witness.bytes_by(Way.IOMMU, write=True) == 0

    def test_across_mapped_and_message_memory(self, qemu: FakeQemu) -> None:
        first = qemu.add_memory(0x10000, PAGE)
        second = qemu.add_message_memory(0x10000 + PAGE, PAGE)
        first.view[-16:] = b"first mapped part"[:16]
        second.view[:16] = b"then the message"
        target = qemu.add_memory(0x80000, PAGE)
        device = self.copy(qemu, 0x10000 + PAGE - 16, 0x80000)
        qemu.wait(lambda: device.copies == 1)
        assert bytes(target.view[:32]) == b"first mapped parthen the message"

    def test_no_message_is_larger_than_the_machine_takes(self) -> None:
        with FakeQemu(Card(), wire.Capabilities(max_transfer_bytes=12)) as qemu:
            memory = qemu.add_message_memory(0x10000, PAGE)
            memory.view[:0x20] = bytes(range(0x20))
            device = self.copy(qemu, 0x10000, 0x10800)
            qemu.wait(lambda: device.copies == 1)
            assert bytes(memory.view[0x800:0x820]) == bytes(range(0x20))
            assert device.witness.counters()["message"]["reads"] == 3

    def test_what_is_asked_for_at_once_fits_into_the_machine_s_socket(self) -> None:
        """QEMU 11.1 never sends again on a socket that an answer has filled."""
        size = 4 * server.MAX_MESSAGE_BYTES
        with FakeQemu(Card(), wire.Capabilities(max_transfer_bytes=1 << 20)) as qemu:
            qemu.add_message_memory(0x100000, size)
            window = qemu.device.bus.reach(0x100000, size, write=False)
            assert window.size_bytes == server.MAX_MESSAGE_BYTES
            assert server.MAX_MESSAGE_BYTES * server.MAX_READS < 208 << 10

    @pytest.mark.parametrize("target", [0x10000, 0x900000])
    def test_unmapped_faults(self, qemu: FakeQemu, target: int) -> None:
        memory = qemu.add_memory(0x10000, PAGE)
        memory.view[:4] = b"here"
        source = 0x900000 if target == 0x10000 else 0x10000
        device = self.copy(qemu, source, target)
        qemu.wait(lambda: bool(qemu.faults))
        assert qemu.faults == [(0x900000, 8, target == 0x900000)]
        assert device.copies == 0
        assert bytes(memory.view[:4]) == b"here"

    def test_read_only(self, qemu: FakeQemu) -> None:
        memory = SharedMemory.create(PAGE, name="ram")
        qemu.map(0x10000, memory, write=False)
        self.copy(qemu, 0x10000, 0x10800)
        qemu.wait(lambda: bool(qemu.faults))
        assert qemu.faults == [(0x10800, 8, True)]

    def test_unmapped_means_unreachable_at_once(self, qemu: FakeQemu) -> None:
        qemu.add_memory(0x10000, 2 * PAGE)
        qemu.unmap(0x10000 + PAGE, PAGE)
        device = self.copy(qemu, 0x10000, 0x10100)
        qemu.wait(lambda: device.copies == 1)
        self.copy(qemu, 0x10000 + PAGE, 0x10100)
        qemu.wait(lambda: bool(qemu.faults))

    def test_unmap_all(self, qemu: FakeQemu) -> None:
        qemu.add_memory(0x10000, PAGE)
        request = wire.DmaUnmap(24, wire.UnmapFlag.ALL, 0, 0)
        qemu.call(Command.DMA_UNMAP, wire.DMA_UNMAP.encode(request))
        assert len(qemu.device.bus.table) == 0

    def test_without_bus_mastering_nothing_moves(self, qemu: FakeQemu) -> None:
        qemu.add_memory(0x10000, PAGE)
        qemu.enable_dma(on=False)
        device = self.copy(qemu, 0x10000, 0x10800)
        qemu.wait(lambda: device.witness.count(Event.ACCESS_ERROR) > 0)
        assert device.copies == 0
        assert not qemu.faults

    def test_a_register_is_answered_while_a_dma_waits(self, qemu: FakeQemu) -> None:
        """QEMU serves no DMA while it waits for a register: that must not be a deadlock."""
        memory = qemu.add_message_memory(0x10000, PAGE)
        device = self.copy(qemu, 0x10000, 0x10800)
        for value in range(50):
            qemu.write(0, 0x20, value)
            assert qemu.read(0, 0x20) == value
        qemu.wait(lambda: device.copies == 1)
        assert memory.size_bytes == PAGE

    @pytest.mark.parametrize(
        ("address", "size", "flags", "number"),
        [
            (0x10000, PAGE, 3, errno.EEXIST),
            (0x20001, PAGE, 3, errno.EINVAL),
            (0x20000, 0, 3, errno.EINVAL),
            (0x20000, 2 * PAGE, 3, errno.EINVAL),  # the file has one page
            (0x20000, PAGE, 8, errno.EINVAL),
        ],
    )
    def test_maps_that_are_refused(
        self, qemu: FakeQemu, address: int, size: int, flags: int, number: int
    ) -> None:
        memory = qemu.add_memory(0x10000, PAGE)
        request = wire.DMA_MAP.encode(wire.DmaMap(32, flags, 0, address, size))
        assert refusal(qemu, Command.DMA_MAP, request, (memory.fd,)) == number

    def test_unsealable_memory_is_reached_by_message(self, qemu: FakeQemu, tmp_path: Path) -> None:
        path = tmp_path / "ram"
        path.write_bytes(bytes(PAGE))
        with path.open("r+b") as file:
            request = wire.DMA_MAP.encode(wire.DmaMap(32, 3, 0, 0x10000, PAGE))
            qemu.call(Command.DMA_MAP, request, (file.fileno(),))
        self.copy(qemu, 0x10000, 0x10800)
        qemu.wait(lambda: bool(qemu.faults))  # asked of the machine, which knows nothing of it


class TestInterrupts:
    def test_a_vector_fires(self, qemu: FakeQemu) -> None:
        qemu.arm(0)
        qemu.arm(3)
        qemu.write(0, 0x108, 3)
        assert (qemu.interrupts(0), qemu.interrupts(3)) == (0, 1)

    def test_a_masked_vector_stays_pending(self, qemu: FakeQemu) -> None:
        qemu.arm(2)
        mask = IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_MASK
        unmask = IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_UNMASK
        qemu.call(Command.DEVICE_SET_IRQS, wire.IRQ_SET.encode(wire.IrqSet(20, mask, 2, 2, 1)))
        qemu.write(0, 0x108, 2)
        assert qemu.interrupts(2) == 0
        assert qemu.read(0, 0x3000, 8) == 1 << 2
        qemu.call(Command.DEVICE_SET_IRQS, wire.IRQ_SET.encode(wire.IrqSet(20, unmask, 2, 2, 1)))
        assert qemu.interrupts(2) == 1
        assert qemu.read(0, 0x3000, 8) == 0

    def test_a_vector_without_eventfd_fires_when_it_gets_one(self, qemu: FakeQemu) -> None:
        qemu.arm(0)
        qemu.write(0, 0x108, 5)
        qemu.arm(5)
        assert qemu.interrupts(5) == 1

    def test_disabled_interrupts_are_lost(self, qemu: FakeQemu) -> None:
        qemu.write(0, 0x108, 0)
        qemu.arm(0)
        assert qemu.interrupts(0) == 0

    def test_disabling_all(self, qemu: FakeQemu) -> None:
        qemu.arm(1)
        flags = IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_TRIGGER
        qemu.call(Command.DEVICE_SET_IRQS, wire.IRQ_SET.encode(wire.IrqSet(20, flags, 2, 0, 0)))
        qemu.write(0, 0x108, 1)
        assert qemu.interrupts(1) == 0

    def test_chosen_by_booleans(self, qemu: FakeQemu) -> None:
        for vector in range(3):
            qemu.arm(vector)
        flags = IrqSetFlag.DATA_BOOL | IrqSetFlag.ACTION_TRIGGER
        request = wire.IRQ_SET.encode(wire.IrqSet(23, flags, 2, 0, 3)) + b"\1\0\1"
        qemu.call(Command.DEVICE_SET_IRQS, request)
        assert [qemu.interrupts(vector) for vector in range(3)] == [1, 0, 1]

    @pytest.mark.parametrize(
        ("flags", "kind", "start", "amount"),
        [
            (IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER, 2, 8, 1),
            (IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER, 2, 0, 2),  # one descriptor
            (IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_MASK, 2, 0, 1),
            (IrqSetFlag.DATA_NONE, 2, 0, 1),
            (IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_TRIGGER, 9, 0, 1),
            (IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_TRIGGER, 2, 0xFFFFFFFF, 0xFFFFFFFF),
            (IrqSetFlag.DATA_BOOL | IrqSetFlag.ACTION_TRIGGER, 2, 0, 2),  # no data
            (0xFFFFFFFF, 2, 0, 1),
        ],
    )
    def test_requests_that_make_no_sense(
        self, qemu: FakeQemu, flags: int, kind: int, start: int, amount: int
    ) -> None:
        fd = os.eventfd(0)
        request = wire.IRQ_SET.encode(wire.IrqSet(20, flags, kind, start, amount))
        assert refusal(qemu, Command.DEVICE_SET_IRQS, request, (fd,)) == errno.EINVAL
        os.close(fd)

    def test_what_is_no_eventfd_does_no_harm(self, qemu: FakeQemu) -> None:
        reader, writer = os.pipe()
        flags = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
        request = wire.IRQ_SET.encode(wire.IrqSet(20, flags, 2, 0, 1))
        qemu.call(Command.DEVICE_SET_IRQS, request, (reader,))
        os.close(reader)
        os.close(writer)
        qemu.write(0, 0x108, 0)
        assert qemu.device.failure is None


class TestReset:
    def test_registers_and_work_are_gone(self, qemu: FakeQemu) -> None:
        device = qemu.device
        assert isinstance(device, Card)
        qemu.write(0, 0x20, 5)
        qemu.run(self.begin(device))
        qemu.reset()
        qemu.wait(lambda: not device._tasks)
        assert qemu.read(0, 0x20) == 0
        assert qemu.config_read(4, 2) == 0

    async def begin(self, device: Card) -> None:
        device.start(device.sleep())

    def test_function_level_reset(self, qemu: FakeQemu) -> None:
        qemu.write(0, 0x20, 5)
        express = find_capability(qemu, 0x10)
        qemu.config_write(express + 8, 0x8000, 2)
        assert qemu.read(0, 0x20) == 0
        assert qemu.config_read(express + 8, 2) & 0x8000 == 0

    def test_mappings_outlive_it(self, qemu: FakeQemu) -> None:
        qemu.add_memory(0x10000, PAGE)
        qemu.reset()
        assert len(qemu.device.bus.table) == 1


def find_capability(qemu: FakeQemu, number: int) -> int:
    at = qemu.config_read(0x34, 1)
    while at:
        if qemu.config_read(at, 1) == number:
            return at
        at = qemu.config_read(at + 1, 1)
    raise AssertionError(f"no capability {number:#x}")
