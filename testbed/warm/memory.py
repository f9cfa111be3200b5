# SPDX-License-Identifier: Apache-2.0
"""A machine's memory on disk: the blocks that are not zero, one after the other.

Of 1 GiB about 120 MiB are left. Both ways the data goes from one mapping to a file in few system
calls; no page of it passes through Python.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from mmap import PROT_READ, mmap
from pathlib import Path

BLOCK_BYTES = 1 << 16

Runs = Sequence[tuple[int, int]]  # offset in the memory, length: both in bytes, in order


def pack(memory: mmap | bytes, target: Path) -> Runs:
    """Write the blocks of ``memory`` that hold anything; returns where they belong.

    :raises OSError: no space.
    """
    zero = bytes(BLOCK_BYTES)
    runs: list[tuple[int, int]] = []
    with memoryview(memory) as view, target.open("xb") as packed:
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            if block == zero[: len(block)]:
                continue
            packed.write(block)
            if runs and sum(runs[-1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + len(block))
            else:
                runs.append((start, len(block)))
    return tuple(runs)


def unpack(packed: Path, runs: Runs, target_fd: int) -> None:
    """Write the blocks where they belong; the rest of ``target_fd`` is zero, as it was made so.

    :raises OSError: no memory, or the file is not what was packed.
    """
    with packed.open("rb") as source:
        size_bytes = os.fstat(source.fileno()).st_size
        if size_bytes != sum(length for _, length in runs):
            raise OSError(0, "it is shorter or longer than it was", str(packed))
        if not size_bytes:
            return
        with mmap(source.fileno(), 0, prot=PROT_READ) as blocks, memoryview(blocks) as view:
            position = 0
            for start, length in runs:
                end = position + length
                while position < end:
                    written = os.pwrite(
                        target_fd, view[position:end], start + length - (end - position)
                    )
                    position += written
