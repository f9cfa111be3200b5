# SPDX-License-Identifier: Apache-2.0
"""Page tables of the GPU model, built in its video memory through the CPU's view of it.

Four levels of 512 entries, pages of 4 KiB and 2 MiB; format: docs/gpu-model.md. The device keeps
translations until they are invalidated, so a table that became empty is used again only after the
next invalidation of everything.
"""

from __future__ import annotations

import errno

from guest_agent.hw import model_registers as hw
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest_agent.hw.region import Region

TABLE_BYTES = 4096
SMALL_PAGE_BYTES = 1 << 12
LARGE_PAGE_BYTES = 1 << 21
VIRTUAL_BITS = 48
_SHIFTS = {SMALL_PAGE_BYTES: (39, 30, 21, 12), LARGE_PAGE_BYTES: (39, 30, 21)}
_ADDRESS = (1 << 52) - SMALL_PAGE_BYTES
_VALID, _LARGE = hw.ENTRY_VALID, hw.ENTRY_LARGE


class TablePool:
    """Where tables come from: ``size_bytes`` of video memory from ``offset`` on."""

    def __init__(self, region: Region, offset: int, size_bytes: int) -> None:
        region.check(offset, size_bytes)
        self.region = region
        self._next = offset
        self._end = offset + size_bytes
        self._empty: list[int] = []
        self._retired: list[int] = []

    def take(self) -> int:
        """The offset of a table without entries.

        :raises OSError: ENOMEM: none is left (invalidating may free some).
        """
        if self._empty:
            return self._empty.pop()
        if self._next + TABLE_BYTES > self._end:
            raise OSError(
                errno.ENOMEM,
                f"no room for page tables; {len(self._retired)} wait for an invalidation of all",
            )
        self._next += TABLE_BYTES
        place = self._next - TABLE_BYTES
        self.region.write(place, bytes(TABLE_BYTES))
        return place

    def retire(self, place: int) -> None:
        """An empty table that the device may still know."""
        self._retired.append(place)

    def invalidated(self) -> None:
        """The device has forgotten all."""
        self._empty += self._retired
        self._retired.clear()


class PageTables:
    """One address space. Nothing here tells the device: see ``Gpu.invalidate``."""

    def __init__(self, pool: TablePool) -> None:
        self._pool = pool
        self._words = pool.region.words64
        self.root = pool.take()
        self._used: dict[int, int] = {self.root: 0}  # table → how many of its entries are valid

    def map(
        self,
        virtual: int,
        size_bytes: int,
        address: int,
        aperture: int,
        *,
        page_bytes: int = SMALL_PAGE_BYTES,
        writable: bool = True,
        replace: bool = False,
    ) -> None:
        """Translate ``virtual`` onwards to ``address`` onwards in ``aperture`` (the byte).

        :param replace: pages may be there already.
        :raises ParameterError: not aligned to pages, no such page size, beyond 48 bits.
        :raises OSError: EEXIST: a page is there, or a table where a large page should be; ENOMEM.
            Pages before it stay mapped.
        """
        if page_bytes not in _SHIFTS:
            raise ParameterError(f"page_bytes: {page_bytes} is neither 4096 nor 2097152")
        _check_range(virtual, size_bytes, page_bytes)
        if address % page_bytes or address + size_bytes > _ADDRESS + SMALL_PAGE_BYTES:
            raise ParameterError(
                f"address: {address:#x} is no multiple of {page_bytes}, or too far"
            )
        bits = _VALID | aperture << 4 | hw.ENTRY_WRITABLE * writable
        if page_bytes == LARGE_PAGE_BYTES:
            bits |= _LARGE
        shift = _SHIFTS[page_bytes][-1]
        words = self._words
        done = 0
        while done < size_bytes:
            here = virtual + done
            table = self._table(here, _SHIFTS[page_bytes])
            first = here >> shift & 0x1FF
            count = min(512 - first, (size_bytes - done) // page_bytes)
            at = (table >> 3) + first
            for index in range(at, at + count):
                old = words[index]
                if old & _VALID:
                    if not replace or (shift == 21 and not old & _LARGE):
                        raise _exists(here + (index - at) * page_bytes)
                else:
                    self._used[table] += 1
                words[index] = address + done | bits
                done += page_bytes

    def unmap(self, virtual: int, size_bytes: int) -> int:
        """Take pages away; returns how many bytes were mapped.

        :raises ParameterError: not whole pages, or a part of a large one (what is before it is
            gone then).
        """
        _check_range(virtual, size_bytes, SMALL_PAGE_BYTES)
        here, end = virtual, virtual + size_bytes
        unmapped = 0
        while here < end:
            path, size = self._walk(here)
            place, table = path[-1]
            if self._words[place >> 3] & _VALID:
                if here % size or end - here < size:
                    raise ParameterError(f"virtual: {here:#x} is in a large page: unmap it whole")
                self._words[place >> 3] = 0
                self._used[table] -= 1
                unmapped += size
                self._prune(path)
            here = (here & -size) + size
        return unmapped

    def find(self, virtual: int) -> int:
        """The entry that translates an address, as it is in the table now; 0 if there is none."""
        path, _ = self._walk(virtual)
        entry = self._words[path[-1][0] >> 3]
        return entry if entry & _VALID else 0

    def close(self) -> None:
        """Give all tables back; the device must use none of them any more."""
        for table in self._used:
            self._pool.region.write(table, bytes(TABLE_BYTES))
            self._pool.retire(table)
        self._used.clear()

    def _table(self, virtual: int, shifts: tuple[int, ...]) -> int:
        """The table that holds a page's entry; made, with those above it, if need be."""
        table = self.root
        for shift in shifts[:-1]:
            index = (table >> 3) + (virtual >> shift & 0x1FF)
            entry = self._words[index]
            if not entry & _VALID:
                below = self._pool.take()
                self._used[below] = 0
                self._used[table] += 1
                self._words[index] = entry = below | _VALID
            elif entry & _LARGE:
                raise _exists(virtual)
            table = entry & _ADDRESS
        return table

    def _walk(self, virtual: int) -> tuple[list[tuple[int, int]], int]:
        """Entries on the way to an address, as (place, table); how many bytes the last is for."""
        path = []
        table = self.root
        for shift in _SHIFTS[SMALL_PAGE_BYTES]:
            place = table + (virtual >> shift & 0x1FF) * 8
            path.append((place, table))
            entry = self._words[place >> 3]
            if shift == 12 or not entry & _VALID or entry & _LARGE:
                return path, 1 << shift
            table = entry & _ADDRESS
        raise AssertionError("level 0 has pages only")

    def _prune(self, path: list[tuple[int, int]]) -> None:
        """Let go of tables that became empty, from the bottom up; the root stays."""
        for (_, table), (place, above) in zip(path[:0:-1], path[-2::-1], strict=True):
            if self._used[table]:
                return
            del self._used[table]
            self._pool.retire(table)
            self._words[place >> 3] = 0
            self._used[above] -= 1


def _check_range(virtual: int, size_bytes: int, page_bytes: int) -> None:
    if virtual % page_bytes or size_bytes % page_bytes or not size_bytes:
        raise ParameterError(
            f"virtual: {virtual:#x} + {size_bytes:#x} are not whole pages of {page_bytes}"
        )
    if virtual + size_bytes > 1 << VIRTUAL_BITS:
        raise ParameterError(f"virtual: {virtual:#x} + {size_bytes:#x} is beyond 48 bits")


def _exists(virtual: int) -> OSError:
    return OSError(errno.EEXIST, f"something is mapped at {virtual:#x}")
