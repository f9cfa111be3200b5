# SPDX-License-Identifier: Apache-2.0
"""A machine's memory in a file: as long as the memory, with holes where it is zero.

Restored machines map it privately: pages that a machine only reads are the file's own, once in the
host's memory for all machines, and a page that it writes is a copy of its own from then on. Of
1 GiB about 120 MiB are no holes.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator, Sequence
from mmap import mmap
from pathlib import Path

import xxhash

BLOCK_BYTES = 1 << 16

Runs = Sequence[tuple[int, int]]  # offset in the memory, length: both in bytes, in order


def pack(memory: mmap | bytes, target: Path) -> Runs:
    """Write the blocks of ``memory`` that hold anything; returns where those are.

    :raises OSError: no space.
    """
    zero = bytes(BLOCK_BYTES)
    runs: list[tuple[int, int]] = []
    with memoryview(memory) as view, target.open("xb", buffering=0) as file:
        for start in range(0, len(view), BLOCK_BYTES):
            # Whatever an error's traceback holds on to, the mapping can be closed.
            with view[start : start + BLOCK_BYTES] as block:
                length = len(block)
                if block == zero[:length]:
                    continue
                _write(file.fileno(), block, start)
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            else:
                runs.append((start, length))
        file.truncate(len(view))
    return tuple(runs)


def _write(fd: int, block: memoryview, position: int) -> None:
    done = 0
    while done < len(block):
        with block[done:] as rest:
            done += os.pwrite(fd, rest, position + done)


def checksum(fd: int, runs: Runs, size_bytes: int) -> str:
    """A hash of the runs, one after the other; "" if it is not that long or not zero elsewhere.

    XXH3 of 128 bits: against damage, not malice, and in a seventh of SHA-256's time.

    :raises OSError: it cannot be read.
    """
    if os.fstat(fd).st_size != size_bytes:
        return ""
    digest = xxhash.xxh3_128()
    end = 0
    for start, length in (*runs, (size_bytes, 0)):
        if any(any(piece) for piece in _data(fd, end, start)):
            return ""
        for piece in _pieces(fd, start, start + length):
            digest.update(piece)
        end = start + length
    return digest.hexdigest()


def _pieces(fd: int, start: int, end: int) -> Iterator[memoryview]:
    """Each is there until the next one is asked for."""
    room = memoryview(bytearray(4 * BLOCK_BYTES))
    while start < end:
        length = os.preadv(fd, [room[: end - start]], start)
        if not length:
            raise OSError(errno.EIO, "it ended while it was read")
        yield room[:length]
        start += length


def _data(fd: int, start: int, end: int) -> Iterator[memoryview]:
    """What of a range is no hole: nothing of one, unless the filesystem has none."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)  # perhaps beyond the range
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole until the file's end
                return
            raise
        stop = min(end, os.lseek(fd, start, os.SEEK_HOLE)) if start < end else end
        yield from _pieces(fd, start, stop)
        start = stop


class OpenMemory:
    """The file, held open for reading: it stays what it is although the entry may be pruned."""

    def __init__(self, path: Path) -> None:
        """:raises OSError: it is gone."""
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)

    @property
    def place(self) -> str:
        """A path by which other processes of this user open the same file."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"
