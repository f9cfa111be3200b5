# SPDX-License-Identifier: Apache-2.0
"""A bus, and models of ``edu`` and ``igb`` on it, as far as their drivers use them."""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Callable

from guest_agent.hw.device import Device
from guest_agent.hw.region import Region

PAGE = 4096


class BusFault(Exception):
    """Nothing is mapped at an address."""


class Bus:
    """What devices reach, and a log of what they touched."""

    def __init__(self) -> None:
        self._windows: list[tuple[int, Region, bool]] = []
        self.faults: list[tuple[str, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.events: list[str] = []  # what drivers did to devices, in order

    def memory(self, iova: int, size: int, *, writable: bool = True) -> Region:
        """New memory at this address."""
        region = Region(mmap.mmap(-1, size))
        self._windows.append((iova, region, writable))
        return region

    def _find(self, iova: int, size: int, access: str) -> tuple[Region, int]:
        for start, region, writable in self._windows:
            inside = start <= iova and iova + size <= start + region.size_bytes
            if inside and (writable or access == "read"):
                return region, iova - start
        self.faults.append((access, iova))
        raise BusFault(f"{access} {iova:#x}")

    def read(self, iova: int, size: int) -> bytes:
        region, offset = self._find(iova, size, "read")
        return region.read(offset, size)

    def write(self, iova: int, data: bytes) -> None:
        self.writes.append((iova, len(data)))
        region, offset = self._find(iova, len(data), "write")
        region.write(offset, data)


class Registers(Region):
    """A register page whose accesses are a model's to answer."""

    def __init__(self, bus: Bus) -> None:
        super().__init__(mmap.mmap(-1, PAGE))
        self.bus = bus
        self.values: dict[int, int] = {}

    def read32(self, offset: int) -> int:
        return self.values.get(offset, 0)

    def write32(self, offset: int, value: int) -> None:
        self.values[offset] = value


class FakeDevice(Device):
    """A function with one register page."""

    def __init__(
        self, registers: Registers, identity: tuple[int, int], on_reset: Callable[[], None]
    ):
        super().__init__("0000:05:00.0")
        self._regions[0] = registers
        self._identity = identity
        self._on_reset = on_reset
        self.resets = 0
        self.has_reset = True
        self.armed = False

    def config_read(self, offset: int, size_bytes: int) -> int:
        return self._identity[offset // 2] if offset < 4 else 0

    def config_write(self, offset: int, size_bytes: int, value: int) -> None:
        pass

    def reset(self) -> bool:
        if self.has_reset:
            self.resets += 1
            self._on_reset()
        return self.has_reset

    def is_armed(self) -> bool:
        return self.armed


class FakeEdu(Registers):
    """hw/misc/edu.c; a DMA ends at the ``polls``-th look at the command register."""

    def __init__(self, bus: Bus) -> None:
        super().__init__(bus)
        self.buffer = bytearray(PAGE)
        self.polls = 1
        self.stuck = False
        self.started: list[int] = []
        self.device = FakeDevice(self, (0x1234, 0x11E8), lambda: None)
        self.device.has_reset = False
        self._left = 0

    def write64(self, offset: int, value: int) -> None:
        if self.values.get(0x98, 0) & 1:
            return
        self.values[offset] = value
        if offset == 0x98:
            self.started.append(value)
            self.bus.events.append("start")
            self._left = self.polls

    def write32(self, offset: int, value: int) -> None:
        if offset == 0x64:
            self.values[0x24] = self.values.get(0x24, 0) & ~value
        else:
            super().write32(offset, value)

    def read32(self, offset: int) -> int:
        if offset == 0x98:
            self.bus.events.append("look")
        if offset == 0x98 and self.values.get(0x98, 0) & 1 and not self.stuck:
            self._left -= 1
            if self._left <= 0:
                self._run()
        return super().read32(offset)

    def _run(self) -> None:
        source, target, size = self.values[0x80], self.values[0x88], self.values[0x90]
        try:
            if self.values[0x98] & 2:
                self.bus.write(target, bytes(self.buffer[source - 0x40000 :][:size]))
            else:
                data = self.bus.read(source, size)
                self.buffer[target - 0x40000 : target - 0x40000 + size] = data
        except BusFault:
            pass  # the device is not told
        if self.values[0x98] & 4:
            self.values[0x24] = self.values.get(0x24, 0) | 0x100
        self.values[0x98] &= ~1


class FakeIgb(Registers):
    """hw/net/igb_core.c: loopback of queue 0 with headers split off."""

    RX, TX = 0xC000, 0xE000

    def __init__(self, bus: Bus) -> None:
        super().__init__(bus)
        self.stuck = False
        self.link = True
        self.interrupts = 0
        self.frames: list[bytes] = []
        self.device = FakeDevice(self, (0x8086, 0x10C9), self.power_on)
        self.power_on()

    def power_on(self) -> None:
        self.values.clear()

    def write32(self, offset: int, value: int) -> None:
        if offset == 0x0000 and value & 1 << 26:
            self.power_on()
            return
        super().write32(offset, value)
        if offset == 0x0020 and value & 0x1200 == 0x1200 and self.link:
            self.values[0x0008] = 2
        if offset == self.TX + 0x18 and not self.stuck:
            self._transmit()

    def _ring(self, base: int, index: int) -> int:
        start = self.values[base] | self.values[base + 4] << 32
        assert index * 16 < self.values[base + 8], "beyond the end of the ring"
        return start + index * 16

    def _is_on(self) -> bool:
        queues = self.values.get(self.TX + 0x28, 0) & self.values.get(self.RX + 0x28, 0)
        loopback = self.values.get(0x0100, 0) & 0x42 == 0x42 and self.values.get(0x0400, 0) & 2
        return bool(queues >> 25 & 1 and loopback and self.values.get(0x0008, 0) & 2)

    def _transmit(self) -> None:
        if not self._is_on():
            return
        frame, dropped = b"", False
        while self.values[self.TX + 0x10] != self.values[self.TX + 0x18]:
            at = self._ring(self.TX, self.values[self.TX + 0x10])
            address, word = struct.unpack("<QQ", self.bus.read(at, 16))
            size = word & 0xFFFF
            assert address % PAGE + size <= PAGE, "a fragment crosses a page"
            try:
                frame += self.bus.read(address, size)
            except BusFault:
                dropped = True
            if word >> 24 & 1:
                if not dropped:
                    self._receive(frame)
                frame, dropped = b"", False
            if word >> 27 & 1:
                self.bus.write(at + 8, struct.pack("<Q", word | 1 << 32))
                self.interrupts += 1
            self.values[self.TX + 0x10] += 1

    def _receive(self, frame: bytes) -> None:
        self.frames.append(frame)
        head, tail = self.values[self.RX + 0x10], self.values[self.RX + 0x18]
        control = self.values[self.RX + 0x0C]
        header_size, buffer_size = (control >> 8 & 0x3F) * 64, (control & 0x7F) * 1024
        assert control >> 25 & 7 == 5, "headers are not split off"
        assert frame[12:14] == b"\x88\xb5", "a frame that the device would parse"
        if len(frame) > (tail - head) * buffer_size:
            return
        at = self._ring(self.RX, head)
        packet, header = struct.unpack("<QQ", self.bus.read(at, 16))
        for address, data in ((header, frame[:header_size]), (packet, frame[header_size:])):
            with contextlib.suppress(BusFault):  # posted: the device is not told
                self.bus.write(address, data)
        self.bus.write(at, struct.pack("<QQ", 0, 3 | (len(frame) - header_size) << 32))
        self.values[self.RX + 0x10] += 1
