# SPDX-License-Identifier: Apache-2.0
"""This process's memory in video memory, and devices that mirror it: the module ``hmm_peer``.

Its sources (``guest_agent/kmod/hmm_peer``) say what each command means to the kernel. A step that
the kernel refuses is an answer with its ``errno``, not an error.
"""

from __future__ import annotations

import mmap
import os
import struct

from guest_agent.hw.binding import Bindings
from guest_agent.hw.region import Region
from guest_agent.p2p.command_file import BOUNCE_OFFSET, ask, open_file, tell
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MODULE = "hmm_peer"
MAX_PAGES = 16

# /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
_PAGEMAP = "/proc/self/pagemap"
_PFN = (1 << 55) - 1
_PRESENT = 1 << 63


class PrivateMemory:
    """Pieces of memory and mirrors by name, and the functions that the module drives meanwhile."""

    def __init__(self) -> None:
        self._bindings = Bindings()
        self._memories: dict[str, Region] = {}
        self._mirrors: dict[str, int] = {}

    def bind(self, bdf: str) -> None:
        """Let the module drive a function until the end. Raises OSError as Binding does."""
        self._bindings.take(bdf, MODULE)

    def unbind(self, bdf: str) -> None:
        """Give a function back, whatever is in its memory; ParameterError if it is not ours."""
        if not self._bindings.give_back(bdf):
            raise ParameterError(f"device: {bdf} is not bound to {MODULE}")

    def alloc(self, name: str, pages: int) -> None:
        """Ordinary memory of this process. ParameterError: there is such a name, or too much."""
        if name in self._memories:
            raise ParameterError(f"name: there is a memory {name!r} already")
        if not 0 < pages <= MAX_PAGES:
            raise ParameterError(f"pages: 1 to {MAX_PAGES}, not {pages}")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memories[name] = Region(mmap.mmap(-1, pages * mmap.PAGESIZE, flags=flags))

    def memory(self, name: str) -> Region:
        """ParameterError if there is none. Whoever reads or writes it faults its pages in."""
        if name not in self._memories:
            raise ParameterError(f"memory: there is no {name!r}")
        return self._memories[name]

    def pages(self, name: str) -> list[int]:
        """For each page its physical address in system memory, or -1: it is not there.

        The page table's word, and nothing is faulted in by asking.
        """
        memory = self.memory(name)
        first = memory.virtual_address() // mmap.PAGESIZE
        count = memory.size_bytes // mmap.PAGESIZE
        fd = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
        try:
            entries = struct.unpack(f"<{count}Q", os.pread(fd, 8 * count, 8 * first))
        finally:
            os.close(fd)
        return [(e & _PFN) * mmap.PAGESIZE if e & _PRESENT else -1 for e in entries]

    def take(self, name: str, bdf: str) -> list[dict[str, Any]]:
        """Migrate all of a memory into a function's video memory; a line for each page."""
        fd = open_file(MODULE)
        try:
            return tell(fd, f"take {bdf} {self._place(name)}")
        finally:
            os.close(fd)

    def owner(self, bdf: str) -> dict[str, Any]:
        """How many of its pages are in use, and how many faults have taken back."""
        return ask(MODULE, f"owner {bdf}")

    def mirror(self, mirror: str, name: str, bdf: str, manners: list[str]) -> list[dict[str, Any]]:
        """Let a device look at a memory; a line of the whole, and one for each page."""
        if mirror not in self._mirrors:
            self._mirrors[mirror] = open_file(MODULE)
        words = " ".join(("mirror", bdf, self._place(name), *manners))
        return tell(self._mirrors[mirror], words)

    def tell(self, mirror: str, words: str) -> list[dict[str, Any]]:
        """``state`` or ``dma …`` of a mirror; ParameterError if there is none."""
        return tell(self._mirror(mirror), words)

    def put(self, mirror: str, data: bytes) -> None:
        """Write the memory that the device copies from."""
        os.pwrite(self._mirror(mirror), data, BOUNCE_OFFSET)

    def get(self, mirror: str, size_bytes: int) -> bytes:
        """Read the memory that the device copies to."""
        return os.pread(self._mirror(mirror), size_bytes, BOUNCE_OFFSET)

    def close(self) -> None:
        """Give everything back, mirrors first."""
        while self._mirrors:
            os.close(self._mirrors.popitem()[1])
        while self._memories:
            self._memories.popitem()[1].close()
        self._bindings.close()

    def _mirror(self, name: str) -> int:
        if name not in self._mirrors:
            raise ParameterError(f"mirror: there is no {name!r}")
        return self._mirrors[name]

    def _place(self, name: str) -> str:
        memory = self.memory(name)
        return f"{memory.virtual_address()} {memory.size_bytes // mmap.PAGESIZE}"
