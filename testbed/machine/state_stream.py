# SPDX-License-Identifier: Apache-2.0
"""The file in which QEMU writes its devices' state, as far as its sections can be told apart.

A head, sections, and an end mark. A section has a number, its device's name, versions and a body
whose length only the device knows, and ends in a mark with its number (QEMU migration/savevm.c,
``save_section_header`` and ``save_section_footer``; docs/devel/migration/main.rst).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

HEAD = struct.pack(">4sI", b"QEVM", 3)
_END, _FULL, _FOOTER = 0x00, 0x04, 0x7E
_NUMBER = struct.Struct(">I")
_VERSIONS_BYTES = 8  # of instance and version


@dataclass(frozen=True)
class Section:
    """Where one device's state is: the bytes from ``begin`` to before ``end``."""

    name: str
    begin: int
    end: int


def sections(state: bytes) -> list[Section]:
    """All of them, in order; they lie one behind the other.

    :raises ValueError: this is no such file, or it is cut short.
    """
    if not state.startswith(HEAD):
        raise ValueError("not what QEMU writes: its first bytes are others")
    found = []
    place = len(HEAD)
    while state[place:] != bytes((_END,)):
        name, number, body = _opened(state, place)
        end = _closed(state, number, body)
        found.append(Section(name, place, end))
        place = end
    return found


def without(state: bytes, ending: str) -> bytes:
    """The same without the devices whose names end so. :raises ValueError: as :func:`sections`."""
    kept = [each for each in sections(state) if not each.name.endswith(ending)]
    parts = (state[each.begin : each.end] for each in kept)
    return b"".join((HEAD, *parts, bytes((_END,))))


def _opened(state: bytes, place: int) -> tuple[str, bytes, int]:
    """A section's name and number, and where its body begins."""
    head = _head(state, place)
    if head is None:
        raise ValueError(f"not what QEMU writes: no section begins at byte {place}")
    return head


def _head(state: bytes, place: int) -> tuple[str, bytes, int] | None:
    number, size = state[place + 1 : place + 5], state[place + 5 : place + 6]
    if state[place : place + 1] != bytes((_FULL,)) or not size:
        return None
    begin = place + 6
    name = state[begin : begin + size[0]]
    if len(name) < size[0] or not name.isascii() or not name.decode().isprintable():
        return None
    return name.decode(), number, begin + size[0] + _VERSIONS_BYTES


def _closed(state: bytes, number: bytes, body: int) -> int:
    """Where a section ends: behind its mark, where another or the end of all follows."""
    mark = bytes((_FOOTER,)) + number
    at = state.find(mark, body)
    while at >= 0:
        end = at + len(mark)
        if _head(state, end) is not None or state[end:] == bytes((_END,)):
            return end
        at = state.find(mark, at + 1)  # a body may hold the same bytes
    raise ValueError(f"not what QEMU writes: section {_NUMBER.unpack(number)[0]} has no end")
