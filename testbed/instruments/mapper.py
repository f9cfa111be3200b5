# SPDX-License-Identifier: Apache-2.0
"""The one place through which suites map memory for devices, and where mutations break it.

Addresses are handed out upwards and never twice, each range with unmapped guard space behind it:
a stale translation can then never be mistaken for a fresh one, and running over the end faults.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from testbed.errors import TestbedError
from testbed.instruments.interface import Agent
from testbed.instruments.memory import Memory
from testbed.instruments.mutations import Mutation
from testbed.results.evidence import MappingUsed
from testbed.results.judging import PAGE_BYTES

CHUNK_BYTES = 2 << 20  # second level of the page table: alignment and guard of every range

# Where ranges may start: below 39 bits, the narrowest IOMMU, and far from guest memory. The first
# that holds no BAR is taken, so that no mapping is the identity and no bus address is mapped.
_BASES = tuple(gib << 30 for gib in (64, 128, 192, 256, 320, 384, 448))
_SPACE_BYTES = 32 << 30


@dataclass(frozen=True)
class Mapping:
    """A mapping, as asked for: a device that uses ``iova`` reaches ``memory`` at ``offset``."""

    iova: int
    size_bytes: int
    memory: Memory
    offset: int
    read: bool
    write: bool

    @property
    def evidence(self) -> MappingUsed:
        """For the outcome."""
        return MappingUsed(
            self.iova, self.size_bytes, self.memory.place(self.offset), self.read, self.write
        )


@dataclass(frozen=True)
class Chunk:
    """One entry of a scatter list: ``size_bytes`` at ``offset`` of the memory."""

    offset: int
    size_bytes: int


class Mapper:
    """Maps into one VFIO container.

    :param bars: ``(bus address, size)`` of every BAR of the node, to be kept clear of.
    """

    def __init__(
        self,
        agent: Agent,
        container: int,
        bars: Iterable[tuple[int, int]],
        mutation: Mutation = Mutation.NONE,
    ) -> None:
        self._agent = agent
        self._container = container
        self._mutation = mutation
        self._next = _base_clear_of(bars)
        self._mapped: dict[int, int] = {}  # really mapped now: IOVA → size
        self._spare: Memory | None = None

    def reserve(self, size_bytes: int) -> int:
        """An IOVA for a range of that size, 2 MiB aligned, mapped by nobody."""
        iova = self._next
        chunks = -(-size_bytes // CHUNK_BYTES)
        self._next += (chunks + 1) * CHUNK_BYTES
        return iova

    def hole(self, size_bytes: int = PAGE_BYTES) -> int:
        """An IOVA at which nothing is mapped, and will not be."""
        iova = self.reserve(size_bytes)
        if self._mutation is Mutation.MAP_HOLES and self._spare is not None:
            self._map(iova, self._spare.size_bytes, self._spare, 0, read=True, write=True)
        return iova

    def use_for_holes(self, memory: Memory) -> None:
        """The memory that :attr:`Mutation.MAP_HOLES` puts where nothing should be."""
        self._spare = memory

    def map(
        self,
        memory: Memory,
        offset: int = 0,
        size_bytes: int | None = None,
        *,
        iova: int | None = None,
        read: bool = True,
        write: bool = True,
        own: bool = False,
    ) -> Mapping:
        """Map a range for every device of the container; at a reserved ``iova`` or a new one.

        :param own: it is the requester's own memory, which mutations leave alone: they break
            what one device is told of another's memory.
        """
        size = memory.size_bytes - offset if size_bytes is None else size_bytes
        address = self.reserve(size) if iova is None else iova
        real_offset, real_size, real_write = offset, size, write
        if memory.is_bar and memory.bus_address is not None and not own:
            match self._mutation:
                case Mutation.BAR_ADDRESS:
                    bus = memory.bus_address + offset
                    return Mapping(bus, size, memory, offset, read, write)
                case Mutation.WRONG_PAGE:
                    wraps = offset + size + PAGE_BYTES > memory.size_bytes
                    real_offset += -PAGE_BYTES if wraps else PAGE_BYTES
                case Mutation.SHORT_MAP if size > PAGE_BYTES:
                    real_size -= PAGE_BYTES
                case Mutation.READ_WRITE:
                    real_write = True
                case _:
                    pass
        self._map(address, real_size, memory, real_offset, read=read, write=real_write)
        return Mapping(address, size, memory, offset, read, write)

    def map_scattered(self, memory: Memory, chunks: Sequence[Chunk]) -> list[Mapping]:
        """Map pieces of ``memory`` one after the other, contiguous for the device."""
        order = list(chunks)
        if self._mutation is Mutation.SWAP_CHUNKS:
            pages = [i for i, chunk in enumerate(order) if chunk.size_bytes == PAGE_BYTES]
            first, second = pages[:2]
            order[first], order[second] = order[second], order[first]
        iova = self.reserve(sum(chunk.size_bytes for chunk in order))
        mappings = []
        for chunk in order:
            mappings.append(self.map(memory, chunk.offset, chunk.size_bytes, iova=iova))
            iova += chunk.size_bytes
        return mappings

    def unmap(self, mapping: Mapping) -> None:
        """Take a mapping away."""
        if self._mutation is not Mutation.SKIP_UNMAP:
            self._unmap(mapping.iova)

    def release(self) -> None:
        """Take away all that is mapped, whatever the mutation."""
        ranges = [{"iova": at, "size_bytes": size} for at, size in self._mapped.items() if size]
        self._mapped.clear()
        if ranges:
            self._agent.call("vfio.unmap_ranges", container=self._container, ranges=ranges)

    def keep(self, mapping: Mapping) -> None:
        """Leave this one alone in :meth:`release`: it lasts as long as the container."""
        self._mapped.pop(mapping.iova, None)

    def _map(
        self, iova: int, size_bytes: int, memory: Memory, offset: int, *, read: bool, write: bool
    ) -> None:
        self._agent.call(
            "vfio.map",
            container=self._container,
            iova=iova,
            size_bytes=size_bytes,
            source=memory.source(offset),
            read=read,
            write=write,
            page_bytes=0,
        )
        self._mapped[iova] = size_bytes

    def _unmap(self, iova: int) -> None:
        size_bytes = self._mapped.pop(iova, 0)
        if size_bytes:
            self._agent.call(
                "vfio.unmap", container=self._container, iova=iova, size_bytes=size_bytes
            )


def _base_clear_of(bars: Iterable[tuple[int, int]]) -> int:
    taken = list(bars)
    for base in _BASES:
        if all(address + size <= base or address >= base + _SPACE_BYTES for address, size in taken):
            return base
    raise TestbedError("no free I/O address space below 39 bits: BARs are everywhere")
