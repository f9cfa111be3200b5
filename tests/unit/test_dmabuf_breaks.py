# SPDX-License-Identifier: Apache-2.0
"""What the mutations break about dma-bufs."""

from __future__ import annotations

import pytest

from testbed.instruments.dmabuf_breaks import break_of
from testbed.instruments.mutations import Mutation

PAGE = 4096
TWO = [(0, 4 * PAGE), (8 * PAGE, 4 * PAGE)]


@pytest.mark.parametrize(
    ("mutation", "wanted"),
    [
        (Mutation.NONE, TWO),
        (Mutation.KEEP_OPEN, TWO),
        (Mutation.FIRST_RANGE, TWO[:1]),
        (Mutation.WRONG_PAGE, [(PAGE, 4 * PAGE), (9 * PAGE, 4 * PAGE)]),
        (Mutation.SHORT_MAP, [(0, 4 * PAGE), (8 * PAGE, 3 * PAGE)]),
    ],
)
def test_ranges(mutation: Mutation, wanted: list[tuple[int, int]]) -> None:
    assert list(break_of(mutation).ranges(TWO)) == wanted


def test_lengths_are_cut() -> None:
    cut = break_of(Mutation.LENGTH_32_BITS)
    assert list(cut.ranges([(0, (8 << 30) + PAGE)])) == [(0, PAGE)]
    assert list(break_of(Mutation.SHORT_MAP).ranges([(0, PAGE)])) == [(0, PAGE)]


def test_manners_of_those_that_can_be_told() -> None:
    stubborn, without = break_of(Mutation.SKIP_UNMAP), break_of(Mutation.NO_FAULT)
    assert stubborn.manners(["dynamic"]) == ["dynamic", "stubborn"]
    assert stubborn.manners([]) == []
    assert without.manners(["dynamic", "ondemand"]) == ["dynamic"]
    assert break_of(Mutation.ELSEWHERE).manners(["dynamic"]) == ["dynamic"]
