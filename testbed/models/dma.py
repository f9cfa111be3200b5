# SPDX-License-Identifier: Apache-2.0
"""The table of what the guest's IOMMU lets a device reach: IOVA ranges and the memory behind them.

QEMU sends DMA_MAP when the guest maps something for the device and DMA_UNMAP when it unmaps; with
a virtual IOMMU that is page by page, so neighbours that continue each other are kept as one.
Everything is answered by interval look-up; the views handed out are valid until the caller lets
the event loop run again (an unmap may come then).
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from testbed.models.memory import SharedMemory
from testbed.models.wire import MAX_DMA_MAPPINGS, PAGE_BYTES

ADDRESS_LIMIT = 1 << 64


class MappingRefused(Exception):
    """The mapping is not possible; ``number`` is the errno for the reply."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Mapping(NamedTuple):
    """Addresses from ``start`` to ``end`` (exclusive); without memory, messages reach them."""

    start: int
    end: int
    memory: SharedMemory | None
    offset: int
    readable: bool
    writable: bool

    def continues(self, other: Mapping) -> bool:
        """Whether this one and ``other``, just before it, are one range of one memory."""
        return (
            other.end == self.start
            and other.memory is self.memory
            and other.readable == self.readable
            and other.writable == self.writable
            and (self.memory is None or other.offset + (other.end - other.start) == self.offset)
        )

    def part(self, start: int, end: int) -> Mapping:
        """The part from ``start`` to ``end``, both within this one."""
        offset = self.offset + (start - self.start) if self.memory is not None else 0
        return Mapping(start, end, self.memory, offset, self.readable, self.writable)


class Reach(NamedTuple):
    """What stands at an address: ``size_bytes`` of it, and the mapping if there is one."""

    size_bytes: int
    mapping: Mapping | None
    view: memoryview | None


class DmaTable:
    """The mappings of one device, in order of address, never overlapping."""

    def __init__(self, limit: int = MAX_DMA_MAPPINGS) -> None:
        self._limit = limit
        self._starts: list[int] = []
        self._mappings: list[Mapping] = []

    def __len__(self) -> int:
        return len(self._mappings)

    def mappings(self) -> tuple[Mapping, ...]:
        """All of them, neighbours merged, in order of address."""
        return tuple(self._mappings)

    def map(
        self,
        address: int,
        size_bytes: int,
        memory: SharedMemory | None,
        offset: int,
        *,
        readable: bool,
        writable: bool,
    ) -> None:
        """Add a mapping. MappingRefused with EINVAL for a range that is no range or lies outside
        the memory, EACCES for writing to what is read-only, EEXIST for an overlap, ENOSPC when
        there are too many.
        """
        end = address + size_bytes
        if not size_bytes or end > ADDRESS_LIMIT or (address | size_bytes | offset) % PAGE_BYTES:
            raise MappingRefused(22, f"no page range: {address:#x}+{size_bytes:#x}")
        if memory is not None:
            if offset + size_bytes > memory.size_bytes:
                raise MappingRefused(22, "the range lies outside the memory that came with it")
            if writable and not memory.writable:
                raise MappingRefused(13, "the memory that came with it is read-only")
        after = bisect_right(self._starts, address)
        if after and self._mappings[after - 1].end > address:
            raise MappingRefused(17, f"{address:#x} is mapped already")
        if after < len(self._starts) and self._starts[after] < end:
            raise MappingRefused(17, f"{self._starts[after]:#x} is mapped already")
        new = Mapping(address, end, memory, offset if memory else 0, readable, writable)
        first, last = after, after
        if after and new.continues(self._mappings[after - 1]):
            first -= 1
            new = Mapping(
                self._starts[first], end, memory, self._mappings[first].offset, readable, writable
            )
        if after < len(self._mappings) and self._mappings[after].continues(new):
            last += 1
            new = Mapping(
                new.start, self._mappings[after].end, memory, new.offset, readable, writable
            )
        if first == last and len(self._mappings) >= self._limit:
            raise MappingRefused(28, "too many mappings")
        self._starts[first:last] = [new.start]
        self._mappings[first:last] = [new]

    def unmap(self, address: int, size_bytes: int) -> int:
        """Make a range unreachable, whatever was mapped in it, cutting mappings that reach beyond;
        answers how many bytes were mapped there.
        """
        end = address + size_bytes
        first = bisect_right(self._starts, address)
        if first and self._mappings[first - 1].end > address:
            first -= 1
        last = first
        removed = 0
        rest: list[Mapping] = []
        while last < len(self._mappings) and self._starts[last] < end:
            mapping = self._mappings[last]
            if mapping.start < address:
                rest.append(mapping.part(mapping.start, address))
            if mapping.end > end:
                rest.append(mapping.part(end, mapping.end))
            removed += min(mapping.end, end) - max(mapping.start, address)
            last += 1
        self._mappings[first:last] = rest
        self._starts[first:last] = [mapping.start for mapping in rest]
        return removed

    def clear(self) -> None:
        """Unmap all."""
        self._starts.clear()
        self._mappings.clear()

    def reach(self, address: int, size_bytes: int, *, write: bool) -> Reach:
        """What a DMA to ``address`` meets first, at most ``size_bytes`` of it.

        A view, if the mapping allows the access and has memory; otherwise none, and the access has
        to go by message, so that the virtual IOMMU judges it.
        """
        after = bisect_right(self._starts, address)
        if after:
            mapping = self._mappings[after - 1]
            if mapping.end > address:
                size = min(size_bytes, mapping.end - address)
                allowed = mapping.writable if write else mapping.readable
                if mapping.memory is None or not allowed:
                    return Reach(size, mapping, None)
                start = mapping.offset + (address - mapping.start)
                return Reach(size, mapping, mapping.memory.view[start : start + size])
        if after < len(self._starts):
            size_bytes = min(size_bytes, self._starts[after] - address)
        return Reach(size_bytes, None, None)
