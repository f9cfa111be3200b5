# SPDX-License-Identifier: Apache-2.0
"""The page tables of the GPU model: four levels of 512 entries in video memory, 48-bit addresses.

Levels 3 to 1 choose by bits 47 to 39, 38 to 30 and 29 to 21; an entry of level 1 is a table or a
2 MiB page; level 0 chooses by bits 20 to 12. The same format serves the MMU and the windows that a
GPU exports over its links. Formats: :class:`testbed.models.registers.Entry`.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from testbed.models.memory import SharedMemory
from testbed.models.registers import (
    ENTRY_ADDRESS_MASK,
    LARGE_PAGE_BYTES,
    SMALL_PAGE_BYTES,
    VIRTUAL_BITS,
    Aperture,
    Entry,
    FaultCause,
)

MAX_CACHED: Final = 1 << 16
_ENTRY: Final = Struct("<Q")
_LEVEL_SHIFTS: Final = (39, 30, 21, 12)


class Translation(NamedTuple):
    """A page: virtual ``start`` to ``end`` is ``address`` onwards in ``aperture`` (the byte)."""

    start: int
    end: int
    address: int
    aperture: int
    writable: bool


class Untranslatable(Exception):
    """No translation for that access."""

    def __init__(self, cause: FaultCause) -> None:
        super().__init__(cause.text)
        self.cause = cause


def walk(memory: SharedMemory, root: int, address: int) -> Translation:
    """Look an address up in the tables, as they are now. Untranslatable if there is no entry."""
    if not 0 <= address < 1 << VIRTUAL_BITS:
        raise Untranslatable(FaultCause.NOT_VALID)
    table = root & ENTRY_ADDRESS_MASK
    for shift in _LEVEL_SHIFTS:
        place = table + (address >> shift & 0x1FF) * 8
        if place + 8 > memory.size_bytes:
            raise Untranslatable(FaultCause.BAD_ENTRY)
        (entry,) = _ENTRY.unpack_from(memory.view, place)
        if not entry & Entry.VALID:
            raise Untranslatable(FaultCause.NOT_VALID)
        target = entry & ENTRY_ADDRESS_MASK
        if shift == 12 or entry & Entry.LARGE:
            return _leaf(entry, shift, address, target)
        table = target
    raise AssertionError("level 0 has leaves only")


def _leaf(entry: int, shift: int, address: int, target: int) -> Translation:
    size = 1 << shift
    if size not in (SMALL_PAGE_BYTES, LARGE_PAGE_BYTES) or target % size:
        raise Untranslatable(FaultCause.BAD_ENTRY)
    aperture = (entry & Entry.APERTURE) >> 4
    if aperture & 0xF == Aperture.VIRTUAL:
        raise Untranslatable(FaultCause.BAD_ENTRY)
    start = address & -size
    return Translation(start, start + size, target, aperture, bool(entry & Entry.WRITABLE))


class TranslationCache:
    """Translations that were used before, kept until they are invalidated, as hardware does.

    So a driver that changes an entry and forgets to invalidate sees the old page. What has no
    translation is looked up again each time.
    """

    def __init__(self) -> None:
        self._small: dict[int, Translation] = {}
        self._large: dict[int, Translation] = {}

    def find(self, memory: SharedMemory, root: int, address: int, *, write: bool) -> Translation:
        """The translation of an access, from the cache or the tables; or Untranslatable."""
        found = self._small.get(address // SMALL_PAGE_BYTES)
        if found is None:
            found = self._large.get(address // LARGE_PAGE_BYTES)
        if found is None:
            found = self._keep(walk(memory, root, address))
        if write and not found.writable:
            raise Untranslatable(FaultCause.NOT_WRITABLE)
        return found

    def find_run(
        self, memory: SharedMemory, root: int, address: int, size_bytes: int, *, write: bool
    ) -> Translation:
        """Likewise, and with the pages that follow on both sides, as far as ``size_bytes`` go."""
        run = self.find(memory, root, address, write=write)
        while run.end < address + size_bytes:
            try:
                more = self.find(memory, root, run.end, write=write)
            except Untranslatable:
                break
            follows = run.address + (run.end - run.start)
            if more.address != follows or more.aperture != run.aperture:
                break
            run = run._replace(end=more.end)
        return run

    def forget(self, address: int) -> None:
        """Invalidate the page that ``address`` is in."""
        self._small.pop(address // SMALL_PAGE_BYTES, None)
        self._large.pop(address // LARGE_PAGE_BYTES, None)

    def clear(self) -> None:
        """Invalidate all."""
        self._small.clear()
        self._large.clear()

    def _keep(self, found: Translation) -> Translation:
        if len(self._small) >= MAX_CACHED:
            self._small.clear()
        if found.end - found.start == LARGE_PAGE_BYTES:
            self._large[found.start // LARGE_PAGE_BYTES] = found
        else:
            self._small[found.start // SMALL_PAGE_BYTES] = found
        return found
