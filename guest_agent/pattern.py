# SPDX-License-Identifier: Apache-2.0
"""The bytes that tests move: computable for any part of a buffer, on both sides of the link.

Every 16-byte word of a pattern differs from every other of the same seed and from those of other
seeds, so that bytes from the wrong place, or left over from before, are never mistaken for the
right ones. Shared with the host, which imports this very module.
"""

from __future__ import annotations

WORD_BYTES = 16
BLOCK_BYTES = 4096

_ONES = int.from_bytes((1).to_bytes(WORD_BYTES, "little") * (BLOCK_BYTES // WORD_BYTES), "little")
_bases: dict[int, int] = {}


def pattern(seed: int, offset: int, size_bytes: int) -> bytes:
    """Bytes ``offset`` to ``offset + size_bytes`` of the endless pattern ``seed``.

    Block k of 4 KiB is a pseudo-random block of the seed, with k + 1 added (exclusive or) to
    each of its 16-byte words.
    """
    base = _base(seed)
    first = offset // BLOCK_BYTES
    last = (offset + size_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES
    blocks = b"".join(
        (base ^ (block + 1) * _ONES).to_bytes(BLOCK_BYTES, "little") for block in range(first, last)
    )
    start = offset - first * BLOCK_BYTES
    return blocks[start : start + size_bytes]


def _base(seed: int) -> int:
    base = _bases.get(seed)
    if base is None:
        from hashlib import shake_128  # noqa: PLC0415  0.15 s on an emulated CPU

        base = int.from_bytes(shake_128(str(seed).encode()).digest(BLOCK_BYTES), "little")
        if len(_bases) >= 64:
            _bases.clear()
        _bases[seed] = base
    return base
