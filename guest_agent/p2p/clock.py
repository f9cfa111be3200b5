# SPDX-License-Identifier: Apache-2.0
"""Time, handed in: the machine's for devices, a simulated one for models and tests."""

from __future__ import annotations

import heapq
import time
from typing import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Clock(Protocol):
    """What the core knows of time."""

    def now_ns(self) -> int:
        """Nanoseconds since some start; never goes back."""
        ...

    def pause(self, until_ns: int) -> None:
        """Let others work; return at ``until_ns`` or before."""
        ...

    def wake(self, at_ns: int) -> None:
        """Something ends at that time by itself: a pause that is under way then returns."""
        ...


_POLL_NS = 200_000


class MonotonicClock:
    """The machine's clock."""

    def now_ns(self) -> int:
        """``CLOCK_MONOTONIC``."""
        return time.monotonic_ns()

    def pause(self, until_ns: int) -> None:
        """Sleep for a poll interval of 0.2 ms, or less."""
        left = min(until_ns - time.monotonic_ns(), _POLL_NS)
        if left > 0:
            time.sleep(left / 1e9)

    def wake(self, at_ns: int) -> None:
        """Nothing to do: pauses are shorter than anyone would notice."""


class ManualClock:
    """Simulated time: it stands still until someone pauses, and runs what is due on the way."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._order = 0
        self._due: list[tuple[int, int, Callable[[], object]]] = []

    def now_ns(self) -> int:
        """The simulated time, from 0."""
        return self._now_ns

    def at(self, time_ns: int, action: Callable[[], object]) -> None:
        """Run ``action`` when the time comes; actions of one time run in the order given."""
        heapq.heappush(self._due, (max(time_ns, self._now_ns), self._order, action))
        self._order += 1

    def after(self, delay_ns: int, action: Callable[[], object]) -> None:
        """Run ``action`` in ``delay_ns``."""
        self.at(self._now_ns + delay_ns, action)

    def wake(self, at_ns: int) -> None:
        """Let a pause end at that time."""
        self.at(at_ns, lambda: None)

    def pause(self, until_ns: int) -> None:
        """Go to the next action that is due, but not beyond ``until_ns``, and run it."""
        if self._due and self._due[0][0] <= until_ns:
            self._now_ns, _, action = heapq.heappop(self._due)
            action()
        else:
            self._now_ns = max(self._now_ns, until_ns)

    def run(self, until_ns: int) -> None:
        """Run everything that is due up to and at ``until_ns``; the time is then ``until_ns``."""
        while self._due and self._due[0][0] <= until_ns:
            self.pause(until_ns)
        self._now_ns = max(self._now_ns, until_ns)
