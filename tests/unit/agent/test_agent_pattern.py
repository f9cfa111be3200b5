# SPDX-License-Identifier: Apache-2.0
"""The pattern's promises: distinct words, and any part on its own."""

from __future__ import annotations

import pytest

from guest_agent.pattern import WORD_BYTES, pattern


def _words(data: bytes) -> list[bytes]:
    return [data[at : at + WORD_BYTES] for at in range(0, len(data), WORD_BYTES)]


def test_every_word_of_every_seed_differs() -> None:
    words = [word for seed in range(4) for word in _words(pattern(seed, 0, 1 << 18))]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (0, 1), (1, 15), (4095, 2), (4096, 4096), (5, 8192), (12345, 54321), (65535, 1)],
)
def test_any_part_is_that_part_of_the_whole(offset: int, size: int) -> None:
    assert pattern(3, offset, size) == pattern(3, 0, 1 << 17)[offset : offset + size]


def test_far_offsets_and_large_seeds_work() -> None:
    far = pattern(1 << 70, 1 << 40, 32)
    assert len(far) == 32
    assert far != pattern(1 << 70, 0, 32)


def test_the_bytes_are_the_same_everywhere() -> None:
    """The guest and the host may run different versions of Python."""
    assert pattern(7, 4096, 16).hex() == "fb9079a8eac6f051fac4e62b17f6bc86"


def test_many_seeds_do_not_fill_memory() -> None:
    first = pattern(0, 0, 64)
    for seed in range(200):
        pattern(seed, 0, 16)
    assert pattern(0, 0, 64) == first
