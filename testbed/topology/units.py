# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them (``64M``, ``4 KiB``, ``1G``) to bytes, and back.

``K``, ``KiB`` and ``KB`` all mean 1024: memory and BARs come in powers of two, and a rack in which
``64MB`` differed from ``64M`` would only be a trap.
"""

from __future__ import annotations

import difflib
import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

SIZE_PATTERN = r"^\s*([0-9]+)\s*([A-Za-z]*)\s*$"
SIZE_EXPECTED = "a number of bytes or a size such as 4K, 64M or 1G"
# More than this is no size of anything here, and keeps the arithmetic after it within 64 bits.
MAX_SIZE_BYTES = 1 << 62

_FACTORS = {"K": KIB, "M": MIB, "G": GIB, "T": TIB}
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{ending}": factor for letter, factor in _FACTORS.items() for ending in ("", "iB", "B")
}
_UNITS_BY_LOWER = {unit.lower(): unit for unit in _UNITS}


class SizeError(ValueError):
    """A text that is no size; ``nearest`` is the size that was perhaps meant, or ""."""

    def __init__(self, message: str, *, nearest: str = "") -> None:
        super().__init__(message)
        self.nearest = nearest


def parse_size(text: str) -> int:
    """``64M`` to bytes; :class:`SizeError` (a ValueError) says what is wrong."""
    match = re.match(SIZE_PATTERN, text)
    if match is None:
        raise SizeError(f"'{text}' is not a size")
    number, unit = match.groups()
    name = _UNITS_BY_LOWER.get(unit.lower())
    if name is None:
        close = difflib.get_close_matches(unit.lower(), _UNITS_BY_LOWER, n=1, cutoff=0.5)
        nearest = f"{number}{_UNITS_BY_LOWER[close[0]]}" if close else ""
        raise SizeError(f"'{text}' has an unknown unit '{unit}'", nearest=nearest)
    size_bytes = int(number[:20]) * _UNITS[name]
    if len(number) > 20 or size_bytes > MAX_SIZE_BYTES:
        raise SizeError(f"'{text}' is too large")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Bytes to the shortest exact text: ``67108864`` to ``64M``."""
    for unit, factor in reversed(_FACTORS.items()):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


def is_power_of_two(number: int) -> bool:
    """Whether ``number`` is 1, 2, 4, 8 …; PCI BARs must be."""
    return number > 0 and number & (number - 1) == 0


def round_up(number: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``number``."""
    return -(-number // multiple) * multiple


def power_of_two_at_least(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()
