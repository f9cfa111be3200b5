# SPDX-License-Identifier: Apache-2.0
"""Addresses and offsets handed out in ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.p2p_device.ranges import PAGE_BYTES, Ranges

START = 0x10000


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * PAGE_BYTES)), max_size=60))
def test_ranges_lie_inside_and_never_overlap(wishes: list[tuple[bool, int]]) -> None:
    ranges = Ranges(START, 32 * PAGE_BYTES, guard_bytes=PAGE_BYTES, rotate=True)
    taken: dict[int, int] = {}
    for take, size in wishes:
        if take or not taken:
            at = ranges.take(size)
            if at is not None:
                end = at + size
                assert at % PAGE_BYTES == 0
                assert at >= START
                assert end + PAGE_BYTES <= START + 32 * PAGE_BYTES
                assert all(end + PAGE_BYTES <= a or at >= b + PAGE_BYTES for a, b in taken.items())
                taken[at] = end
        else:
            ranges.give_back(taken.popitem()[0])
        assert len(ranges) == len(taken)
    for at in taken:
        ranges.give_back(at)
    assert ranges.left_bytes == 32 * PAGE_BYTES


def test_an_address_that_was_given_back_is_used_again_as_late_as_possible() -> None:
    ranges = Ranges(START, 4 * PAGE_BYTES, rotate=True)
    seen = []
    for _ in range(5):
        at = ranges.take(PAGE_BYTES)
        assert at is not None
        seen.append(at)
        ranges.give_back(at)
    assert len(set(seen[:4])) == 4
    assert seen[4] == seen[0]


def test_a_memory_is_filled_from_its_start_and_says_when_it_is_full() -> None:
    ranges = Ranges(0, 2 * PAGE_BYTES)
    assert ranges.take(1) == 0
    assert ranges.take(2 * PAGE_BYTES) is None
    assert ranges.left_bytes == PAGE_BYTES
    with pytest.raises(KeyError):
        ranges.give_back(PAGE_BYTES)
