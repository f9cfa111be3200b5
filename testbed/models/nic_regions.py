# SPDX-License-Identifier: Apache-2.0
"""The NIC's memory regions: what a key lets whom do, and where its bytes are.

A *pinned* region is one range of IOVAs. An *on-demand* region has a table in the guest's memory
with one 64-bit entry a 4 KiB page; an entry that is not valid is a page fault, which the driver
repairs and replays while whoever wanted the page waits, here or at the other end of the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from testbed.models.access import AccessError, Cause, Mover, Space, Window
from testbed.models.faulting import FaultUnit
from testbed.models.registers import (
    SMALL_PAGE_BYTES,
    FaultCause,
    RegionEntry,
    RegionFlag,
    Replay,
)
from testbed.models.witness import Event, Path, Witness

MAX_REGIONS: Final = 64
PREFETCH: Final = 64  # table entries that are read at once
ENTRY_BYTES: Final = 8
ENTRY_PAGE_MASK: Final = (1 << 64) - SMALL_PAGE_BYTES


@dataclass
class MemoryRegion:
    """One region; ``pages`` are the entries that were read and not invalidated since."""

    key: int
    base: int
    size_bytes: int
    iova: int
    flags: int
    pages: dict[int, int]


class Regions:
    """All regions of one NIC, by key."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._slots: list[MemoryRegion | None] = [None] * MAX_REGIONS
        self._generation = 0

    def commit(self, index: int, flags: int, base: int, size_bytes: int, iova: int) -> int:
        """Put a region into a slot, or empty the slot; answers its key, or 0 if it cannot be."""
        if index >= MAX_REGIONS:
            return 0
        self._slots[index] = None
        if not flags & RegionFlag.VALID or not size_bytes or base + size_bytes > 1 << 64:
            return 0
        if flags & RegionFlag.ON_DEMAND and (base | iova) % SMALL_PAGE_BYTES:
            return 0
        self._generation = self._generation % 0xFFFFFF + 1
        key = self._generation << 8 | index
        self._slots[index] = MemoryRegion(key, base, size_bytes, iova, flags, {})
        return key

    def invalidate(self, index: int) -> None:
        """Forget the table entries of the region in that slot."""
        region = self._slots[index] if index < MAX_REGIONS else None
        if region is not None:
            self._witness.event(Event.INVALIDATION, address=region.base, detail=f"region {index}")
            region.pages.clear()

    def clear(self) -> None:
        """No regions; keys go on."""
        self._slots = [None] * MAX_REGIONS

    def find(self, key: int) -> MemoryRegion | None:
        """The region with that key, if it is still there."""
        region = self._slots[key & 0xFF] if key & 0xFF < MAX_REGIONS else None
        return region if region is not None and region.key == key else None


class RegionSpace(Space):
    """The addresses that one key gives access to, for the NIC itself or for a peer."""

    path = Path.IOMMU

    def __init__(
        self,
        regions: Regions,
        key: int,
        bus: Space,
        mover: Mover,
        faults: FaultUnit,
        *,
        remote: bool,
    ) -> None:
        """``mover`` reads table entries; ``remote``: a peer's access, by the peer's rights."""
        self._regions = regions
        self._key = key
        self._bus = bus
        self._mover = mover
        self._faults = faults
        self._remote = remote

    def reach(self, address: int, size_bytes: int, *, write: bool) -> Window:
        """See :meth:`Space.reach`; LINK_REFUSED for what the key does not allow."""
        region = self._allowed(address, write=write)
        size = min(size_bytes, region.base + region.size_bytes - address)
        within = address - region.base
        if not region.flags & RegionFlag.ON_DEMAND:
            return self._bus.reach(region.iova + within, size, write=write)
        page, offset = divmod(within, SMALL_PAGE_BYTES)
        entry = region.pages.get(page, 0)
        if _fault(entry, write=write) is not None:
            raise AccessError(Cause.PAGE_FAULT, address, write=write)
        size = min(size, SMALL_PAGE_BYTES - offset)
        return self._bus.reach((entry & ENTRY_PAGE_MASK) + offset, size, write=write)

    async def ready(self, address: int, *, write: bool) -> None:
        """Read the page's entry; report a fault and wait for its replay, as often as it takes."""
        while True:
            await self._bus.ready(address, write=write)
            region = self._allowed(address, write=write)
            if not region.flags & RegionFlag.ON_DEMAND:
                return
            page = (address - region.base) // SMALL_PAGE_BYTES
            if page not in region.pages:
                await self._read_entries(region, page)
            cause = _fault(region.pages.get(page, 0), write=write)
            if cause is None:
                return
            region.pages.pop(page, None)  # a replay looks at the table again
            if await self._faults.repair(address, region.key, cause, write=write) is Replay.CANCEL:
                raise AccessError(Cause.PAGE_FAULT, address, write=write)

    async def _read_entries(self, region: MemoryRegion, page: int) -> None:
        pages = (region.size_bytes + SMALL_PAGE_BYTES - 1) // SMALL_PAGE_BYTES
        count = min(PREFETCH, pages - page)
        place = region.iova + page * ENTRY_BYTES
        data = await self._mover.read(self._bus, place, count * ENTRY_BYTES)
        for number in range(count):
            entry = int.from_bytes(data[number * 8 : number * 8 + 8], "little")
            if entry & RegionEntry.VALID:
                region.pages[page + number] = entry

    def _allowed(self, address: int, *, write: bool) -> MemoryRegion:
        region = self._regions.find(self._key)
        if region is None or not region.base <= address < region.base + region.size_bytes:
            raise AccessError(Cause.LINK_REFUSED, address, write=write)
        if self._remote:
            wanted = RegionFlag.REMOTE_WRITE if write else RegionFlag.REMOTE_READ
        else:
            wanted = RegionFlag.LOCAL_WRITE if write else RegionFlag.VALID
        if not region.flags & wanted:
            raise AccessError(Cause.LINK_REFUSED, address, write=write)
        return region


def _fault(entry: int, *, write: bool) -> FaultCause | None:
    if not entry & RegionEntry.VALID:
        return FaultCause.NOT_VALID
    if write and not entry & RegionEntry.WRITABLE:
        return FaultCause.NOT_WRITABLE
    return None
