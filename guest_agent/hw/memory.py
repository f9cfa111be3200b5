# SPDX-License-Identifier: Apache-2.0
"""RAM buffers for DMA, and what can be done with any memory: fill, checksum, read, write."""

from __future__ import annotations

import mmap
import os

from guest_agent.hw.region import Region
from guest_agent.pattern import pattern
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PAGE_BYTES = mmap.PAGESIZE
MAX_READ_BYTES = 1 << 20
_STEP_BYTES = 1 << 18
_MAP_LOCKED = 0x2000  # asm-generic/mman.h; Python does not name it

# Documentation/admin-guide/mm/pagemap.rst
_PAGEMAP_PRESENT = 1 << 63
_PAGEMAP_FRAME = (1 << 55) - 1


class Buffers:
    """The RAM buffers by name: anonymous, populated, locked, page-aligned and zeroed."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}

    def alloc(self, name: str, size_bytes: int) -> int | None:
        """Make a buffer and return its physical address, if it is contiguous and known.

        Only a buffer of one page is sure to be contiguous; larger ones may be, by luck or as
        huge pages. Without an IOMMU a device reaches the buffer at that address.

        :raises ParameterError: the name is taken, or the size is not a multiple of the page size.
        :raises OSError: no memory.
        """
        if not name or name in self._regions:
            raise ParameterError(f"name: {name!r} is taken" if name else "name: empty")
        if size_bytes == 0 or size_bytes % PAGE_BYTES:
            raise ParameterError(f"size_bytes: {size_bytes} is no multiple of {PAGE_BYTES}")
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE | _MAP_LOCKED
        region = Region(mmap.mmap(-1, size_bytes, flags=flags))
        self._regions[name] = region
        return _physical(region)

    def adopt(self, name: str, region: Region) -> int | None:
        """Keep memory of another kind under that name, and return its physical address as above.

        :raises ParameterError: the name is taken; the region is closed then.
        """
        if not name or name in self._regions:
            region.close()
            raise ParameterError(f"name: {name!r} is taken" if name else "name: empty")
        self._regions[name] = region
        region.read32(0)  # so that its first page is there
        return _physical(region)

    def get(self, name: str) -> Region:
        """The buffer. :raises ParameterError: there is none of that name."""
        try:
            return self._regions[name]
        except KeyError:
            raise ParameterError(f"there is no RAM buffer {name!r}") from None

    def free(self, name: str) -> None:
        """Unmap the buffer. :raises ParameterError: there is none of that name."""
        self.get(name).close()
        del self._regions[name]

    def close(self) -> None:
        """Free all."""
        for name in list(self._regions):
            self.free(name)


def _physical(region: Region) -> int | None:
    pages = region.size_bytes // PAGE_BYTES
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        raw = os.pread(fd, pages * 8, region.virtual_address() // PAGE_BYTES * 8)
    finally:
        os.close(fd)
    entries = memoryview(raw).cast("Q")
    first = entries[0] & _PAGEMAP_FRAME
    for index, entry in enumerate(entries):
        # Without privilege the kernel shows every frame number as 0.
        if not entry & _PAGEMAP_PRESENT or not first or entry & _PAGEMAP_FRAME != first + index:
            return None
    return first * PAGE_BYTES


def fill(region: Region, offset: int, size_bytes: int, seed: int) -> None:
    """Write ``pattern(seed, 0, size_bytes)`` at ``offset``. :raises ParameterError: range."""
    region.check(offset, size_bytes)
    for done in range(0, size_bytes, _STEP_BYTES):
        size = min(_STEP_BYTES, size_bytes - done)
        region.write(offset + done, pattern(seed, done, size))


def checksum(region: Region, offset: int, size_bytes: int) -> dict[str, Any]:
    """SHA-256 and CRC-32 of a range, for comparing with the host's. :raises ParameterError: range.

    Sums, not verdicts: what they should be is the host's to know.
    """
    import zlib  # noqa: PLC0415  loaded when needed
    from hashlib import sha256  # noqa: PLC0415  0.15 s on an emulated CPU

    region.check(offset, size_bytes)
    digest = sha256()
    crc = 0
    for done in range(0, size_bytes, _STEP_BYTES):
        part = region.read(offset + done, min(_STEP_BYTES, size_bytes - done))
        digest.update(part)
        crc = zlib.crc32(part, crc)
    return {"sha256": digest.hexdigest(), "crc32": crc}
