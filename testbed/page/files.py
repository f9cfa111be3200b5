# SPDX-License-Identifier: Apache-2.0
"""Reading a run folder that may be a stranger's: no links, no pipes, nothing without a bound.

A run folder comes out of a bundle as easily as out of a run, and a page made from it is sent on: a
link in it would put a file of the reader's into the page.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import Diagnostic, InputError


@dataclass(frozen=True)
class Part:
    """Some of a file: its beginning and its end, and how many bytes between them were left out."""

    head: bytes
    tail: bytes = b""
    cut_bytes: int = 0


def refuse(path: Path, message: str, hint: str = "") -> InputError:
    """The error for a file that cannot be used."""
    return InputError(diagnostics=[Diagnostic(str(path), 0, 0, message)], hint=hint)


def folders(folder: Path) -> Iterator[Path]:
    """The real folders in a folder, by name; links are passed over."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    yield from (folder / name for name in sorted(names))


def is_file(path: Path) -> bool:
    """A regular file, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def read(path: Path, head_bytes: int, tail_bytes: int = 0) -> Part | None:
    """At most ``head_bytes`` from a file's beginning and ``tail_bytes`` from its end.

    :returns: None if there is no such regular file, or it cannot be read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            return None
        try:
            if found.st_size <= head_bytes + tail_bytes:
                return Part(file.read(head_bytes + tail_bytes))
            head = file.read(head_bytes)
            file.seek(found.st_size - tail_bytes)
            tail = file.read(tail_bytes)
        except OSError:
            return None
        return Part(head, tail, found.st_size - len(head) - len(tail))
