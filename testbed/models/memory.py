# SPDX-License-Identifier: Apache-2.0
"""Shared memory that another process gave us: a file that is mapped whole, once.

Guest RAM and VRAM reach the models as descriptors of memory files (memfd), the same file again and
again. Each file is mapped once in the process, whatever number of devices and mappings use it.

A mapped file that its owner shortens kills the reader (SIGBUS). So a file is mapped only if it is
sealed against shrinking; where its owner left that open, the seal is set here. What cannot be
sealed is not mapped, and its user falls back to messages.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Final

MAX_CACHED_FILES: Final = 64


class NotMappable(OSError):
    """This descriptor is no memory that may be mapped."""


class SharedMemory:
    """One memory file, mapped from its first byte to its last."""

    def __init__(self, fd: int, *, name: str = "") -> None:
        """Map the file behind ``fd``, which stays the caller's. NotMappable if it is no regular
        file, cannot be sealed or cannot be mapped.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            raise NotMappable("not a memory file")
        _forbid_shrinking(fd)
        self.identity = (status.st_dev, status.st_ino)
        self.name = name or _name_of(fd)
        self.size_bytes = os.fstat(fd).st_size  # after the seal: it can no longer get smaller
        self.writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
        try:
            self._map = mmap.mmap(fd, self.size_bytes, mmap.MAP_SHARED, protection)
        except (OSError, ValueError, OverflowError) as error:
            raise NotMappable(str(error)) from error
        self.view = memoryview(self._map)
        self.fd = os.dup(fd)  # to pass on; lives as long as this object
        weakref.finalize(self, os.close, self.fd)

    @classmethod
    def create(cls, size_bytes: int, *, name: str) -> SharedMemory:
        """New zeroed memory of this process's own."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            return cls(fd, name=name)
        finally:
            os.close(fd)

    @classmethod
    def open(cls, path: Path, *, name: str) -> SharedMemory:
        """The memory file at ``path``, as ``/proc/PID/fd/N``; OSError if it is not one."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(fd, name=name)
        finally:
            os.close(fd)


def _name_of(fd: int) -> str:
    """What the maker of a memfd called it: `/memfd:NAME (deleted)` in /proc."""
    target = str(Path(f"/proc/self/fd/{fd}").readlink())
    return target.removeprefix("/memfd:").removesuffix(" (deleted)")


def _forbid_shrinking(fd: int) -> None:
    # linux/fcntl.h; memfd_create(2). Files on a disk have no seals: EINVAL.
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError as error:
        raise NotMappable("the file could shrink while it is mapped (no seal)") from error


class MemoryCache:
    """The memory files of one process, by device and inode number.

    Guests map and unmap page by page: a file stays mapped after its last use, so that its page
    tables need not be built again. The least recently used go when there are too many.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[int, int], SharedMemory] = OrderedDict()

    def get(self, fd: int) -> SharedMemory:
        """The memory behind ``fd``; NotMappable or OSError if there is none."""
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        memory = self._files.get(identity)
        wanted = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        if memory is None or memory.size_bytes < status.st_size or (wanted > memory.writable):
            memory = self.add(SharedMemory(fd))
        self._files.move_to_end(identity)
        return memory

    def add(self, memory: SharedMemory) -> SharedMemory:
        """Make known a memory that this process has anyway, so that it keeps its name."""
        known = self._files.pop(memory.identity, None)
        if known is not None and known is not memory:
            memory.name = known.name  # its first name is the one that was chosen
        self._files[memory.identity] = memory
        while len(self._files) > MAX_CACHED_FILES:
            self._files.popitem(last=False)
        return memory
