# SPDX-License-Identifier: Apache-2.0
"""Models on benches that take turns, so that several can speak with one another in one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from testbed.models.testing import FakeQemu

_MOST_TURNS = 4000


class OnABench(Protocol):
    """A model that a fake machine drives."""

    qemu: FakeQemu


def turn_until(condition: Callable[[], bool], *benches: OnABench) -> None:
    """Let all of them work until it holds. :raises AssertionError: it never does."""
    for _ in range(_MOST_TURNS):
        if condition():
            return
        for bench in benches:
            if not bench.qemu.closed:
                bench.qemu.turn()
    raise AssertionError("it never came to be")
