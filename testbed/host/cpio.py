# SPDX-License-Identifier: Apache-2.0
"""Writes initial RAM disks: cpio archives of the "newc" kind, the same bytes for the same content.

Source: the kernel's ``Documentation/driver-api/early-userspace/buffer-format.rst``. Every number is
eight hexadecimal digits; name and data are padded to four bytes; the entry ``TRAILER!!!`` ends an
archive, and archives may follow each other in one file.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_MAX_SIZE_BYTES = 0xFFFF_FFFF


@dataclass(frozen=True)
class Entry:
    """One file of the archive: absolute path in the guest, full mode, content."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str, permissions: int = 0o755) -> Entry:
    """A directory."""
    return Entry(path, stat.S_IFDIR | permissions)


def regular(path: str, data: bytes, permissions: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(path, stat.S_IFREG | permissions, data)


def symlink(path: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A character device."""
    return Entry(path, stat.S_IFCHR | permissions, device=(major, minor))


def from_file(path: str, source: Path, permissions: int | None = None) -> Entry:
    """A host file or link as it is; owner root, and only its permission bits are kept.

    :raises OSError: it cannot be read.
    """
    found = source.lstat()
    if stat.S_ISLNK(found.st_mode):
        return symlink(path, str(source.readlink()))
    mode = found.st_mode & 0o755 if permissions is None else permissions
    return regular(path, source.read_bytes(), mode)


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive, sorted by path, with the directories that lead to each entry.

    :raises ValueError: a path that is not absolute, or occurs twice with different content.
    """
    by_path: dict[str, Entry] = {}
    for entry in entries:
        if not entry.path.startswith("/") or "/../" in entry.path + "/":
            raise ValueError(f"not an absolute path: {entry.path}")
        if by_path.setdefault(entry.path, entry) != entry:
            raise ValueError(f"two files named {entry.path}")
    for path in list(by_path):
        for parent in Path(path).parents:
            if str(parent) != "/":
                by_path.setdefault(str(parent), directory(str(parent)))
    out = bytearray()
    for number, path in enumerate(sorted(by_path), start=1):
        _append(out, number, by_path[path])
    _append(out, 0, Entry("/" + _TRAILER, 0))
    return bytes(out)


def _append(out: bytearray, number: int, entry: Entry) -> None:
    if len(entry.data) > _MAX_SIZE_BYTES:
        raise ValueError(f"{entry.path} is too large for a cpio archive")
    name = entry.path.lstrip("/").encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # ino, mode, uid, gid, nlink, mtime, size, device of the file (2), rdev (2), name size, check
    fields = (
        number,
        entry.mode,
        0,
        0,
        links,
        0,
        len(entry.data),
        0,
        0,
        *entry.device,
        len(name),
        0,
    )
    out += _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    out += bytes(-len(out) % 4)
    out += entry.data
    out += bytes(-len(out) % 4)
