# SPDX-License-Identifier: Apache-2.0
"""The vfio-user messages, as values with exact sizes: no sockets here.

Source: QEMU docs/interop/vfio-user.rst and what hw/vfio-user/ of QEMU 11.1 really sends; the VFIO
structures are those of linux/vfio.h. All numbers are little-endian (QEMU's and our host is x86).
Anything that is not of the right size raises :class:`Malformed`, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final, Generic, NamedTuple, TypeVar

MAX_TRANSFER_BYTES: Final = 1 << 20  # `max_data_xfer_size`: what one message may carry
MAX_MESSAGE_BYTES: Final = 16 + 16 + MAX_TRANSFER_BYTES
MAX_MESSAGE_FDS: Final = 16
MAX_DMA_MAPPINGS: Final = 65535
PAGE_BYTES: Final = 4096
MAX_VERSION_BYTES: Final = 4096


class Malformed(ValueError):
    """The other side sent something that is no vfio-user message: the connection ends."""


class Command(IntEnum):
    """Commands by number; 14 was `DIRTY_PAGES` and is gone."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16


class HeaderFlag(IntFlag):
    """Bits 0 to 3 are the type (0 a command, 1 a reply)."""

    REPLY = 0x1
    TYPE = 0xF
    NO_REPLY = 0x10
    ERROR = 0x20


class DmaFlag(IntFlag):
    """Flags of DMA_MAP."""

    READ = 1
    WRITE = 2


class UnmapFlag(IntFlag):
    """Flags of DMA_UNMAP."""

    DIRTY_BITMAP = 1
    ALL = 2


class DeviceFlag(IntFlag):
    """Flags of DEVICE_GET_INFO."""

    RESET = 1
    PCI = 2


class RegionFlag(IntFlag):
    """Flags of DEVICE_GET_REGION_INFO."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class IrqFlag(IntFlag):
    """Flags of DEVICE_GET_IRQ_INFO."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


class IrqSetFlag(IntFlag):
    """Flags of DEVICE_SET_IRQS: one kind of data, one action."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    ACTION_MASK = 8
    ACTION_UNMASK = 16
    ACTION_TRIGGER = 32
    DATA = 7
    ACTION = 56


# As plain numbers: the complement of an IntFlag has only the bits that it knows, and every
# operation on one makes another, which costs 2 µs a message.
TYPE_MASK: Final = int(HeaderFlag.TYPE)
REPLY: Final = int(HeaderFlag.REPLY)
NO_REPLY: Final = int(HeaderFlag.NO_REPLY)
ERROR_REPLY: Final = int(HeaderFlag.REPLY | HeaderFlag.ERROR)
DMA_READABLE: Final = int(DmaFlag.READ)
DMA_WRITABLE: Final = int(DmaFlag.WRITE)
DMA_FLAGS: Final = int(DmaFlag.READ | DmaFlag.WRITE)
UNMAP_ALL: Final = int(UnmapFlag.ALL)
IRQ_SET_FLAGS: Final = int(IrqSetFlag.DATA | IrqSetFlag.ACTION)


class Irq(IntEnum):
    """VFIO's interrupt indexes of a PCI device."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class Region(IntEnum):
    """VFIO's region indexes of a PCI device; 0 to 5 are the BARs."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class Header(NamedTuple):
    """What precedes every message; ``size`` includes these 16 bytes."""

    message_id: int
    command: int
    size: int
    flags: int
    error: int

    @property
    def is_reply(self) -> bool:
        """True for a reply, False for a command."""
        return self.flags & TYPE_MASK == REPLY


class DmaMap(NamedTuple):
    """``offset`` is one into the descriptor that comes along, if one does."""

    argsz: int
    flags: int
    offset: int
    address: int
    size: int


class DmaUnmap(NamedTuple):
    """With :attr:`UnmapFlag.ALL`, address and size are 0."""

    argsz: int
    flags: int
    address: int
    size: int


class DeviceInfo(NamedTuple):
    """Request and reply of DEVICE_GET_INFO."""

    argsz: int
    flags: int
    num_regions: int
    num_irqs: int


class RegionInfo(NamedTuple):
    """Request and reply of DEVICE_GET_REGION_INFO, without its capabilities."""

    argsz: int
    flags: int
    region: int
    cap_offset: int
    size: int
    offset: int


class IrqInfo(NamedTuple):
    """Request and reply of DEVICE_GET_IRQ_INFO."""

    argsz: int
    flags: int
    irq: int
    total: int


class IrqSet(NamedTuple):
    """DEVICE_SET_IRQS, without its data."""

    argsz: int
    flags: int
    irq: int
    start: int
    amount: int


class RegionAccess(NamedTuple):
    """What precedes the data of REGION_READ and REGION_WRITE, in both directions."""

    offset: int
    region: int
    size_bytes: int


class DmaAccess(NamedTuple):
    """What precedes the data of DMA_READ and DMA_WRITE, in both directions."""

    address: int
    size_bytes: int


class Feature(NamedTuple):
    """DEVICE_FEATURE, without its data."""

    argsz: int
    flags: int


Value = TypeVar("Value", bound=tuple[int, ...])


class Layout(Generic[Value]):
    """The fixed part of one message: bytes to value and back."""

    def __init__(self, form: str, make: Callable[[Iterable[int]], Value]) -> None:
        self._struct = Struct(form)
        self._make = make
        self.size_bytes = self._struct.size

    def decode(self, payload: bytes | bytearray | memoryview, *, exact: bool = True) -> Value:
        """The value at the start of ``payload``; Malformed if that is too short or, with ``exact``,
        too long.
        """
        if len(payload) < self.size_bytes or (exact and len(payload) != self.size_bytes):
            raise Malformed(f"{len(payload)} bytes where {self.size_bytes} belong")
        return self._make(self._struct.unpack_from(payload))

    def encode(self, value: Value) -> bytes:
        """The bytes of ``value``."""
        return self._struct.pack(*value)


HEADER: Final = Layout("<HHIII", Header._make)
DMA_MAP: Final = Layout("<IIQQQ", DmaMap._make)
DMA_UNMAP: Final = Layout("<IIQQ", DmaUnmap._make)
DEVICE_INFO: Final = Layout("<IIII", DeviceInfo._make)
REGION_INFO: Final = Layout("<IIIIQQ", RegionInfo._make)
IRQ_INFO: Final = Layout("<IIII", IrqInfo._make)
IRQ_SET: Final = Layout("<IIIII", IrqSet._make)
REGION_ACCESS: Final = Layout("<QII", RegionAccess._make)
DMA_ACCESS: Final = Layout("<QQ", DmaAccess._make)
FEATURE: Final = Layout("<II", Feature._make)

_HEADER = Struct("<HHIII")
_VERSION = Struct("<HH")
_SPARSE_HEADER = Struct("<HHIII")
_SPARSE_AREA = Struct("<QQ")
_MULTI_COUNT = Struct("<Q")
_MULTI_ONE = Struct("<QII8s")
MULTI_DATA_BYTES: Final = 8
CAP_SPARSE_MMAP: Final = 1


@dataclass(frozen=True)
class Capabilities:
    """What one side can take; the defaults are those that an absent entry stands for."""

    max_message_fds: int = 1
    max_transfer_bytes: int = MAX_TRANSFER_BYTES
    page_sizes: int = PAGE_BYTES
    max_dma_mappings: int = MAX_DMA_MAPPINGS
    write_multiple: bool = False


OURS: Final = Capabilities(max_message_fds=MAX_MESSAGE_FDS, write_multiple=True)


def _number(entries: dict[object, object], name: str, default: int, most: int) -> int:
    value = entries.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Malformed(f"capability {name} is no number")
    return min(value, most)


def decode_version(payload: bytes | bytearray | memoryview) -> tuple[int, int, Capabilities]:
    """Major and minor version and the sender's capabilities."""
    if not _VERSION.size <= len(payload) <= MAX_VERSION_BYTES:
        raise Malformed(f"a version message of {len(payload)} bytes")
    major, minor = _VERSION.unpack_from(payload)
    text = bytes(payload[_VERSION.size :]).rstrip(b"\0")
    if not text:
        return major, minor, Capabilities()
    try:
        data: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed("the version data is no JSON") from error
    entries = data.get("capabilities", {}) if isinstance(data, dict) else None
    if not isinstance(entries, dict):
        raise Malformed("the capabilities are no object")
    most = _number(entries, "max_data_xfer_size", MAX_TRANSFER_BYTES, MAX_TRANSFER_BYTES)
    if not most:
        raise Malformed("no data can be transferred")
    return (
        major,
        minor,
        Capabilities(
            max_message_fds=_number(entries, "max_msg_fds", 1, MAX_MESSAGE_FDS),
            max_transfer_bytes=most,
            page_sizes=_number(entries, "pgsizes", PAGE_BYTES, (1 << 64) - 1),
            max_dma_mappings=_number(entries, "max_dma_maps", MAX_DMA_MAPPINGS, MAX_DMA_MAPPINGS),
            write_multiple=entries.get("write_multiple") is True,
        ),
    )


def encode_version(major: int, minor: int, capabilities: Capabilities) -> bytes:
    """The same message in either direction; compact, as QEMU refuses a reply longer than its own
    proposal (proxy.c, "reply larger than recv buffer").
    """
    entries: dict[str, int | bool] = {
        "max_msg_fds": capabilities.max_message_fds,
        "max_data_xfer_size": capabilities.max_transfer_bytes,
        "pgsizes": capabilities.page_sizes,
        "max_dma_maps": capabilities.max_dma_mappings,
    }
    if capabilities.write_multiple:
        entries["write_multiple"] = True
    text = json.dumps({"capabilities": entries}, separators=(",", ":"))
    return _VERSION.pack(major, minor) + text.encode() + b"\0"


def header_at(received: memoryview, offset: int) -> Header:
    """The header that begins there, with at least its own bytes behind."""
    return Header._make(_HEADER.unpack_from(received, offset))


def encode_header(
    message_id: int, command: int, payload_bytes: int, flags: int = 0, error: int = 0
) -> bytes:
    """The 16 bytes before a payload of ``payload_bytes``."""
    return _HEADER.pack(message_id, command, _HEADER.size + payload_bytes, flags, error)


def encode_sparse_areas(areas: Iterable[tuple[int, int]]) -> bytes:
    """The sparse-mmap capability that follows a region's info: (offset, size) of each area."""
    pairs = list(areas)
    head = _SPARSE_HEADER.pack(CAP_SPARSE_MMAP, 1, 0, len(pairs), 0)
    return head + b"".join(_SPARSE_AREA.pack(*pair) for pair in pairs)


def decode_write_multi(
    payload: bytes | bytearray | memoryview,
) -> list[tuple[RegionAccess, bytes]]:
    """The writes that one REGION_WRITE_MULTI carries, in order."""
    if len(payload) < _MULTI_COUNT.size:
        raise Malformed("a multi-write without its count")
    (count,) = _MULTI_COUNT.unpack_from(payload)
    if len(payload) != _MULTI_COUNT.size + count * _MULTI_ONE.size:
        raise Malformed(f"a multi-write of {count} in {len(payload)} bytes")
    writes = []
    for offset, region, size, data in _MULTI_ONE.iter_unpack(payload[_MULTI_COUNT.size :]):
        if size > MULTI_DATA_BYTES:
            raise Malformed(f"a coalesced write of {size} bytes")
        writes.append((RegionAccess(offset, region, size), data[:size]))
    return writes


def encode_write_multi(writes: Iterable[tuple[RegionAccess, bytes]]) -> bytes:
    """What :func:`decode_write_multi` reads."""
    items = [_MULTI_ONE.pack(*access, data) for access, data in writes]
    return encode_multi_count(len(items)) + b"".join(items)


def encode_multi_count(count: int) -> bytes:
    """The reply to a multi-write: how many were done."""
    return _MULTI_COUNT.pack(count)
