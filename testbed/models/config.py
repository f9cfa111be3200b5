# SPDX-License-Identifier: Apache-2.0
"""A PCI function's configuration space: identity, BARs, capabilities, and who may write what.

Source: PCI Local Bus 3.0, PCI Express Base 5.0 chapter 7; numbers as in linux/pci_regs.h. QEMU
reads it when it plugs the device in, keeps the BAR addresses and MSI-X state itself, and forwards
the guest's reads and writes of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct, pack, pack_into
from typing import Final, NamedTuple

from testbed.models.memory import SharedMemory
from testbed.models.wire import PAGE_BYTES

CONFIG_BYTES: Final = 4096
COMMAND: Final = 0x04
STATUS: Final = 0x06
BAR0: Final = 0x10
CAPABILITY_POINTER: Final = 0x34
INTERRUPT_PIN: Final = 0x3D
FIRST_CAPABILITY: Final = 0x40
FIRST_EXTENDED: Final = 0x100

COMMAND_MEMORY: Final = 0x2
COMMAND_MASTER: Final = 0x4
STATUS_CAPABILITIES: Final = 0x10


class Capability(IntEnum):
    """Capability numbers."""

    PM = 0x01
    MSI = 0x05
    VENDOR = 0x09
    PCIE = 0x10
    MSIX = 0x11


class Extended(IntEnum):
    """Extended capability numbers."""

    AER = 0x0001
    VENDOR = 0x000B


class Identity(NamedTuple):
    """What the function says it is; ``class_code`` is the 24 bits of class, subclass, interface."""

    vendor: int
    device: int
    class_code: int
    revision: int = 1
    subsystem_vendor: int = 0
    subsystem: int = 0


@dataclass(frozen=True)
class Bar:
    """One memory BAR.

    ``size_bytes`` is a power of two, at least 16. With ``memory`` the guest maps that memory
    directly and the model sees no access; without it, every access comes to the model. ``areas``,
    if there are any, are the parts (offset, size) of which the former holds, in whole pages.
    """

    index: int
    size_bytes: int
    is_64bit: bool = False
    prefetchable: bool = False
    memory: SharedMemory | None = None
    areas: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        last = 4 if self.is_64bit else 5
        if not 0 <= self.index <= last:
            raise ValueError(f"there is no BAR {self.index}")
        if self.size_bytes < 16 or self.size_bytes & (self.size_bytes - 1):
            raise ValueError(f"BAR {self.index}: {self.size_bytes} bytes is no power of two >= 16")
        if self.memory is not None and self.memory.size_bytes < self.size_bytes:
            raise ValueError(f"BAR {self.index} is larger than its memory")
        end = 0
        for offset, size in self.areas:
            if self.memory is None or (offset | size) % PAGE_BYTES or not size or offset < end:
                raise ValueError(f"BAR {self.index}: areas are in order, in pages, and need memory")
            end = offset + size
        if end > self.size_bytes:
            raise ValueError(f"BAR {self.index}: an area beyond its end")

    def direct(self, offset: int, size_bytes: int) -> memoryview | None:
        """The memory behind that part, if the guest maps it directly."""
        if self.memory is None:
            return None
        end = offset + size_bytes
        within = any(start <= offset and end <= start + size for start, size in self.areas)
        return self.memory.view[offset:end] if within or not self.areas else None


class MsixLayout(NamedTuple):
    """Where the MSI-X table and its pending bits stand; offsets are multiples of 8."""

    vectors: int
    bar: int
    table_offset: int
    pending_offset: int


class ConfigSpace:
    """The 4096 bytes, what of them is writable, and what is cleared by writing ones."""

    def __init__(self, identity: Identity, bars: tuple[Bar, ...], *, intx: bool = False) -> None:
        self.bytes = bytearray(CONFIG_BYTES)
        self._writable = bytearray(CONFIG_BYTES)
        self._clearable = bytearray(CONFIG_BYTES)
        self._next = FIRST_CAPABILITY
        self._last_pointer = CAPABILITY_POINTER
        self._next_extended = FIRST_EXTENDED
        self._last_extended = 0
        self._device_control = 0
        pack_into("<HH", self.bytes, 0, identity.vendor, identity.device)
        pack_into("<I", self.bytes, 0x08, identity.class_code << 8 | identity.revision)
        pack_into("<HH", self.bytes, 0x2C, identity.subsystem_vendor, identity.subsystem)
        self.bytes[INTERRUPT_PIN] = int(intx)
        # I/O space has no use here; parity, SERR and INTx disable are kept as written.
        pack_into("<H", self._writable, COMMAND, 0x0546)
        pack_into("<H", self._clearable, STATUS, 0xF900)
        self._writable[0x0C] = self._writable[0x3C] = 0xFF  # cache line size, interrupt line
        for bar in bars:
            self._place_bar(bar)
        self._initial = b""

    def seal(self) -> ConfigSpace:
        """Take the present content as the one after a reset; call it when all is added."""
        self._initial = bytes(self.bytes)
        return self

    def reset(self) -> None:
        """Back to what :meth:`seal` saw."""
        self.bytes[:] = self._initial

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``, which lie within the space."""
        return bytes(self.bytes[offset : offset + size])

    def write(self, offset: int, data: bytes | memoryview) -> bool:
        """Write what is writable; True if that asked for a function level reset."""
        for index, value in enumerate(data, offset):
            mask = self._writable[index]
            kept = self.bytes[index] & ~(value & self._clearable[index])
            self.bytes[index] = (kept & ~mask) | (value & mask)
        control = self._device_control
        if control and self.bytes[control + 1] & 0x80:  # Initiate FLR; reads as 0
            self.bytes[control + 1] &= 0x7F
            return True
        return False

    @property
    def bus_master(self) -> bool:
        """Whether the guest lets the function do DMA."""
        return bool(self.bytes[COMMAND] & COMMAND_MASTER)

    def add(
        self, number: int, body: bytes, *, writable: bytes = b"", clearable: bytes = b""
    ) -> int:
        """Append a capability and answer its offset. ``body``, and the masks laid over it, begin
        after the two bytes of number and pointer. ValueError if there is no room.
        """
        offset = self._next
        end = offset + 2 + len(body)
        if end > FIRST_EXTENDED:
            raise ValueError("no room for another capability")
        self.bytes[self._last_pointer] = offset
        self.bytes[STATUS] |= STATUS_CAPABILITIES
        self._put(offset, bytes((number, 0)) + body, 2, writable, clearable)
        self._last_pointer = offset + 1
        self._next = (end + 3) & ~3
        return offset

    def add_extended(
        self,
        number: int,
        body: bytes,
        *,
        version: int = 1,
        writable: bytes = b"",
        clearable: bytes = b"",
    ) -> int:
        """Append an extended capability, likewise; its header has four bytes."""
        offset = self._next_extended
        end = offset + 4 + len(body)
        if end > CONFIG_BYTES:
            raise ValueError("no room for another extended capability")
        if self._last_extended:
            link = int.from_bytes(
                self.bytes[self._last_extended + 2 : self._last_extended + 4], "little"
            )
            pack_into("<H", self.bytes, self._last_extended + 2, (link & 0xF) | offset << 4)
        self._put(offset, pack("<HH", number, version) + body, 4, writable, clearable)
        self._last_extended = offset
        self._next_extended = (end + 3) & ~3
        return offset

    def add_power_management(self) -> int:
        """PM 3.0: D0 and D3hot, no soft reset on the way back."""
        return self.add(Capability.PM, pack("<HHH", 0x0003, 0x0008, 0), writable=pack("<HH", 0, 3))

    def add_msi(self, vectors: int = 1) -> int:
        """MSI with 64-bit addresses and ``vectors`` (a power of two up to 32)."""
        control = 0x80 | (vectors.bit_length() - 1) << 1
        body = Struct("<HIIH2x")
        return self.add(
            Capability.MSI,
            body.pack(control, 0, 0, 0),
            writable=body.pack(0x71, 0xFFFFFFFC, 0xFFFFFFFF, 0xFFFF),
        )

    def add_msix(self, layout: MsixLayout) -> int:
        """MSI-X with its table and pending bits in a BAR."""
        body = pack(
            "<HII",
            layout.vectors - 1,
            layout.table_offset | layout.bar,
            layout.pending_offset | layout.bar,
        )
        return self.add(Capability.MSIX, body, writable=pack("<H", 0xC000))

    def add_pcie(self, *, speed: int = 4, width: int = 16) -> int:
        """A PCI Express endpoint with function level reset, linked at ``speed`` (4 is 16 GT/s)."""
        link = speed | width << 4
        speeds = (2 << speed) - 2  # supported: all up to `speed`
        body = Struct("<HIHHIHH16xIHHIHH")
        offset = self.add(
            Capability.PCIE,
            body.pack(0x0002, 0x10008001, 0x2810, 0, link, 0, link, 0x1F, 0, 0, speeds, speed, 0),
            # Device control: all but FLR is kept; FLR is seen by `write`.
            writable=body.pack(0, 0, 0xFFFF, 0, 0, 0x0FFF, 0, 0, 0x7FFF, 0, 0, 0x00FF, 0),
            clearable=body.pack(0, 0, 0, 0x000F, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        )
        self._device_control = offset + 8
        return offset

    def add_vendor(self, data: bytes) -> int:
        """A vendor-specific capability holding ``data``."""
        return self.add(Capability.VENDOR, bytes((3 + len(data),)) + data)

    def add_error_reporting(self) -> int:
        """Advanced error reporting: status, mask and severity of both kinds of error."""
        every = 0xFFFFFFFF
        body = Struct("<IIIIIII16x")
        return self.add_extended(
            Extended.AER,
            body.pack(0, 0, 0x00462030, 0, 0x00002000, 0, 0),
            version=2,
            writable=body.pack(0, every, every, 0, every, 0, 0),
            clearable=body.pack(every, 0, 0, every, 0, 0, 0),
        )

    def _put(
        self, offset: int, content: bytes, header: int, writable: bytes, clearable: bytes
    ) -> None:
        start = offset + header
        self.bytes[offset : offset + len(content)] = content
        self._writable[start : start + len(writable)] = writable
        self._clearable[start : start + len(clearable)] = clearable

    def _place_bar(self, bar: Bar) -> None:
        at = BAR0 + 4 * bar.index
        kind = (0x4 if bar.is_64bit else 0) | (0x8 if bar.prefetchable else 0)
        mask = ((1 << 64) - bar.size_bytes) & ~0xF
        pack_into("<I", self.bytes, at, kind)
        pack_into("<I", self._writable, at, mask & 0xFFFFFFFF)
        if bar.is_64bit:
            pack_into("<I", self._writable, at + 4, mask >> 32)
