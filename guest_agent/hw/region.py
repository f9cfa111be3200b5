# SPDX-License-Identifier: Apache-2.0
"""A piece of mapped memory: a RAM buffer, video memory or a register page, accessed alike."""

from __future__ import annotations

import mmap

from guest_agent.rpc import ParameterError


class Region:
    """Bytes ``0`` to ``size_bytes`` of a mapping, which this object owns.

    The 32- and 64-bit accessors make exactly one access of that width, as registers need; a plain
    copy of 4 bytes may be made of two that overlap.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self.size_bytes = len(mapping)
        self._words32 = memoryview(mapping).cast("I")
        self.words64 = memoryview(mapping).cast("Q")

    def read32(self, offset: int) -> int:
        """The 32-bit word at ``offset`` (a multiple of 4)."""
        return self._words32[offset >> 2]

    def write32(self, offset: int, value: int) -> None:
        """Store a 32-bit word at ``offset`` (a multiple of 4)."""
        self._words32[offset >> 2] = value

    def write64(self, offset: int, value: int) -> None:
        """Store a 64-bit word at ``offset`` (a multiple of 8)."""
        self.words64[offset >> 3] = value

    def check(self, offset: int, size_bytes: int) -> None:
        """:raises ParameterError: the range is not inside the region."""
        if offset + size_bytes > self.size_bytes:
            raise ParameterError(
                f"offset: {offset:#x} + {size_bytes:#x} is beyond the end at {self.size_bytes:#x}"
            )

    def read(self, offset: int, size_bytes: int) -> bytes:
        """A copy of the bytes; 4 or 8 aligned ones by one access. :raises ParameterError: range."""
        self.check(offset, size_bytes)
        if size_bytes == 4 and offset % 4 == 0:
            return self.read32(offset).to_bytes(4, "little")
        if size_bytes == 8 and offset % 8 == 0:
            return self.words64[offset >> 3].to_bytes(8, "little")
        return self._mapping[offset : offset + size_bytes]

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes; 4 or 8 aligned ones by one access. :raises ParameterError: range."""
        self.check(offset, len(data))
        if len(data) == 4 and offset % 4 == 0:
            self.write32(offset, int.from_bytes(data, "little"))
        elif len(data) == 8 and offset % 8 == 0:
            self.write64(offset, int.from_bytes(data, "little"))
        else:
            self._mapping[offset : offset + len(data)] = data

    def view(self, offset: int, size_bytes: int) -> memoryview:
        """The bytes themselves; release it before :meth:`close`. :raises ParameterError: range."""
        self.check(offset, size_bytes)
        with memoryview(self._mapping) as whole:
            return whole[offset : offset + size_bytes]

    def virtual_address(self) -> int:
        """Where the mapping stands in this process, for ioctls that want a pointer."""
        import ctypes  # noqa: PLC0415  0.2 s on an emulated CPU, and only mapping for DMA needs it

        return ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def close(self) -> None:
        """Unmap. Idempotent."""
        self._words32.release()
        self.words64.release()
        self._mapping.close()
