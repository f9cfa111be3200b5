# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them (``64M``, ``4 KiB``, ``1G``) to bytes, and back; rates and times too.

``K``, ``KiB`` and ``KB`` all mean 1024: memory and BARs come in powers of two, and a rack in which
``64MB`` differed from ``64M`` would only be a trap. Rates (``25GB/s``, ``200Gbit/s``) are decimal,
as makers state them; ``GiB/s`` is binary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from testbed.topology.problem import nearest

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

SIZE_PATTERN = r"^\s*([0-9]+)\s*([A-Za-z]*)\s*$"
SIZE_EXPECTED = "a number of bytes or a size such as 4K, 64M or 1G"
# More than this is no size of anything here, and keeps the arithmetic after it within 64 bits.
MAX_SIZE_BYTES = 1 << 62

RATE_EXPECTED = "a bandwidth such as 25GB/s, 800MB/s or 200Gbit/s"
MAX_BYTES_PER_S = 10**15
DURATION_EXPECTED = "a time such as 300ns, 2us, 5ms or 1s"

NS_PER_S = 1_000_000_000

_FACTORS = {"K": KIB, "M": MIB, "G": GIB, "T": TIB}
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{ending}": factor for letter, factor in _FACTORS.items() for ending in ("", "iB", "B")
}
_UNITS_BY_LOWER = {unit.lower(): unit for unit in _UNITS}


_RATE_UNITS = {  # in bits a second
    f"{prefix}{unit}/s": factor * bits
    for prefix, factor in (
        *(("", 1), ("K", 10**3), ("M", 10**6), ("G", 10**9), ("T", 10**12)),
        *(("Ki", KIB), ("Mi", MIB), ("Gi", GIB), ("Ti", TIB)),
    )
    for unit, bits in (("B", 8), ("bit", 1))
}
_DURATION_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}


class SizeError(ValueError):
    """A text that is no size, rate or time; ``nearest`` is what was perhaps meant, or ""."""

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
        close = nearest(unit.lower(), _UNITS_BY_LOWER, cutoff=0.5)
        meant = f"{number}{_UNITS_BY_LOWER[close]}" if close else ""
        raise SizeError(f"'{text}' has an unknown unit '{unit}'", nearest=meant)
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


def parse_rate(text: str) -> int:
    """``25GB/s`` to bytes a second (at least 1); SizeError as :func:`parse_size`."""
    bytes_per_s = _quantity(text, "bandwidth", _RATE_UNITS) // 8
    if bytes_per_s < 1:
        raise SizeError(f"'{text}' is less than a byte a second")
    if bytes_per_s > MAX_BYTES_PER_S:
        raise SizeError(f"'{text}' is too large")
    return bytes_per_s


def format_rate(bytes_per_s: int) -> str:
    """The shortest exact text: ``25000000000`` to ``25GB/s``."""
    factors = {unit: bits // 8 for unit, bits in _RATE_UNITS.items() if unit.endswith("B/s")}
    texts = [
        f"{bytes_per_s // factor}{unit}"
        for unit, factor in factors.items()
        if bytes_per_s % factor == 0
    ]
    return min(texts, key=len)


def parse_duration(text: str) -> int:
    """``2us`` to nanoseconds; SizeError as :func:`parse_size`."""
    return _quantity(text, "time", _DURATION_UNITS)


def format_duration(time_ns: int) -> str:
    """The shortest exact text: ``2000`` to ``2us``."""
    unit = next(u for u, f in reversed(_DURATION_UNITS.items()) if time_ns % f == 0 or f == 1)
    return f"{time_ns // _DURATION_UNITS[unit]}{unit}"


def _quantity(text: str, what: str, units: Mapping[str, int]) -> int:
    """Rounded down."""
    match = re.match(r"^\s*([0-9]{1,18})(?:\.([0-9]{1,9}))?\s*([A-Za-z/]*)\s*$", text)
    if match is None:
        raise SizeError(f"'{text}' is no {what}")
    whole, part, unit = match.groups(default="")
    factor = units.get(unit)
    if factor is None:
        lower = {known.lower(): known for known in units}
        begun = [each for each in lower if unit and each.startswith(unit.lower())]
        close = begun[0] if begun else nearest(unit.lower(), lower, cutoff=0.5)
        number = f"{whole}.{part}" if part else whole
        problem = f"has an unknown unit '{unit}'" if unit else "has no unit"
        raise SizeError(f"'{text}' {problem}", nearest=f"{number}{lower[close]}" if close else "")
    scale: int = 10 ** len(part)
    return int(whole + part) * factor // scale


def is_power_of_two(number: int) -> bool:
    """Whether ``number`` is 1, 2, 4, 8 …; PCI BARs must be."""
    return number > 0 and number & (number - 1) == 0


def round_up(number: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``number``."""
    return -(-number // multiple) * multiple


def power_of_two_at_least(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()
