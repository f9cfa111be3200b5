# SPDX-License-Identifier: Apache-2.0
"""Small files of /sys and /proc.

Not ``pathlib``: importing it takes 0.2 s on an emulated CPU, before the first call is answered.
"""

from __future__ import annotations

import os

ROOT = "/sys"
_PAGE_BYTES = 1 << 12  # no file of /sys is longer


def read_bytes(path: str) -> bytes:
    """The whole file. :raises OSError: it is absent or cannot be read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, _PAGE_BYTES):
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def read(path: str) -> str:
    """The file's text without the newline at its end. :raises OSError: as above."""
    return read_bytes(path).decode(errors="replace").strip()


def read_or(path: str, default: str) -> str:
    """As :func:`read`, or ``default`` where there is no such file."""
    try:
        return read(path)
    except FileNotFoundError:
        return default


def write(path: str, text: str) -> None:
    """Write ``text`` in one call, as sysfs wants it. :raises OSError: refused; names the file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


def names(path: str) -> list[str]:
    """The folder's entries, sorted; none where there is no such folder."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries)
    except FileNotFoundError:
        return []


def link(path: str) -> str:
    """Where a symbolic link points, or "" where there is none."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def link_name(path: str) -> str:
    """The last part of where a symbolic link points, or ""."""
    return link(path).rpartition("/")[2]
