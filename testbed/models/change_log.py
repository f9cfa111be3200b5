# SPDX-License-Identifier: Apache-2.0
"""Whether QEMU's log says that its PCI tree has changed: one `lseek` while nothing was written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

# After so much, reading what was said takes longer than reading the tree.
MAX_SCAN_BYTES: Final = 256 << 10


class ChangeLog:
    """The log at ``path``, in which lines with one of ``words`` are a change."""

    def __init__(self, path: Path, words: Sequence[str]) -> None:
        self._path = path
        self._words = tuple(word.encode() for word in words)
        self._fd = -1
        self._seen = 0  # its size when it was last looked at
        self._read = 0  # up to here it holds whole lines without a change

    def size_bytes(self) -> int:
        """Its present size; -1 if there is none."""
        try:
            return self._path.stat().st_size
        except OSError:
            return -1

    def follow(self, start: int) -> None:
        """Look at what comes after ``start``. OSError if there is no log."""
        self.close()
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        self._seen = self._read = start

    def close(self) -> None:
        """Look no more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def changed(self) -> bool:
        """Whether there was a change since the last look; also if that cannot be told."""
        if self._fd < 0:
            return True
        size = os.lseek(self._fd, 0, os.SEEK_END)  # a third of what `fstat` takes
        return size != self._seen and self._scan(size)

    def _scan(self, size: int) -> bool:
        if size < self._read or size - self._read > MAX_SCAN_BYTES:
            return True
        data = os.pread(self._fd, size - self._read, self._read)
        self._seen = self._read + len(data)
        self._read += data.rfind(b"\n") + 1
        return any(word in data for word in self._words)
