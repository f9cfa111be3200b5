# SPDX-License-Identifier: Apache-2.0
"""The shared libraries that a program needs, read from its ELF file; nothing is run.

Sources: the System V ABI, "Dynamic Section" (DT_NEEDED, DT_RPATH, DT_RUNPATH); ld.so(8) for where
the loader looks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 15, 29
_MAX_NAME = 4096

# Where Debian's, Fedora's and Arch's loaders look by default.
HOST_FOLDERS = tuple(
    Path(folder)
    for folder in (
        "/usr/local/lib",
        "/lib/x86_64-linux-gnu",
        "/usr/lib/x86_64-linux-gnu",
        "/lib64",
        "/usr/lib64",
        "/lib",
        "/usr/lib",
    )
)


@dataclass(frozen=True)
class Linkage:
    """``loader`` is "" of a static program; ``folders`` are its own, with ``$ORIGIN`` resolved."""

    loader: str
    needed: tuple[str, ...]
    folders: tuple[Path, ...]


STATIC = Linkage("", (), ())


def linkage(path: Path) -> Linkage:
    """What the program or library at ``path`` is linked with; STATIC for what is no ELF file of
    64 bits, or damaged: the guest will say what it thinks of it.
    """
    try:
        data = path.read_bytes()
        return _linkage(data, path) if data.startswith(_MAGIC) else STATIC
    except (OSError, struct.error, ValueError, IndexError):
        return STATIC


def _linkage(data: bytes, path: Path) -> Linkage:
    headers = list(_program_headers(data))
    loader, entries = "", []
    for kind, offset, _, size in headers:
        if kind == _PT_INTERP:
            loader = _text(data, offset)
        if kind == _PT_DYNAMIC:
            pairs = struct.iter_unpack("<QQ", data[offset : offset + size // 16 * 16])
            for tag, value in pairs:
                if tag == _DT_NULL:
                    break
                entries.append((tag, value))
    strings = next((value for tag, value in entries if tag == _DT_STRTAB), None)
    if strings is None:
        return Linkage(loader, (), ())
    table = next(
        offset + strings - address
        for kind, offset, address, size in headers
        if kind == _PT_LOAD and address <= strings < address + size
    )
    needed = [_text(data, table + value) for tag, value in entries if tag == _DT_NEEDED]
    paths = [_text(data, table + v) for tag, v in entries if tag in (_DT_RPATH, _DT_RUNPATH)]
    own = [part for each in paths for part in each.split(":") if part]
    origin = str(path.parent)
    resolved = [part.replace("$ORIGIN", origin).replace("${ORIGIN}", origin) for part in own]
    return Linkage(loader, tuple(needed), tuple(Path(part) for part in resolved))


def _program_headers(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Type, offset in the file, address, size in the file."""
    table = struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    for index in range(count):
        at = table + index * size
        kind = struct.unpack_from("<I", data, at)[0]
        offset, address = struct.unpack_from("<QQ", data, at + 8)
        yield kind, offset, address, struct.unpack_from("<Q", data, at + 32)[0]


def _text(data: bytes, start: int) -> str:
    end = data.index(b"\0", start, start + _MAX_NAME)
    return data[start:end].decode(errors="replace")


@dataclass(frozen=True)
class Wanted:
    """``shipped``: libraries to bring along, by the name that the loader asks for; ``missing``:
    those that are nowhere, each with who needs it.
    """

    shipped: dict[str, Path]
    missing: dict[str, str]


def wanted(
    program: Path,
    in_guest: Callable[[str], bool],
    folders: tuple[Path, ...] = HOST_FOLDERS,
) -> Wanted:
    """What ``program`` needs beside what the guest has, and what those libraries need in turn."""
    found = Wanted({}, {})
    queue = [(program, linkage(program))]
    own = queue[0][1].folders
    while queue:
        user, link = queue.pop()
        for name in link.needed:
            if "/" in name or name in found.shipped or name in found.missing or in_guest(name):
                continue
            places = (folder / name for folder in (*link.folders, *own, *folders))
            library = next((place for place in places if place.is_file()), None)
            if library is None:
                found.missing[name] = user.name
                continue
            found.shipped[name] = library.resolve()
            queue.append((library, linkage(library)))
    return found
