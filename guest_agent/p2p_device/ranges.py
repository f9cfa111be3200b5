# SPDX-License-Identifier: Apache-2.0
"""Numbers handed out in ranges: addresses of an address space, offsets of a memory."""

from __future__ import annotations

import bisect

PAGE_BYTES = 4096


class Ranges:
    """``size_bytes`` from ``start`` on, in whole pages.

    :param guard_bytes: left free behind each range, so that running over its end hits nothing.
    :param rotate: look for room behind the latest range first, so that an address that was given
        back is used again as late as possible, and what is stale is not mistaken for what is fresh.
    """

    def __init__(
        self, start: int, size_bytes: int, *, guard_bytes: int = 0, rotate: bool = False
    ) -> None:
        self._start = start
        self._end = start + size_bytes
        self._guard_bytes = guard_bytes
        self._rotate = rotate
        self._next = start
        self._taken: list[tuple[int, int]] = []  # sorted

    def __len__(self) -> int:
        """How many ranges are taken."""
        return len(self._taken)

    @property
    def left_bytes(self) -> int:
        """What is not taken, in one piece or several."""
        return self._end - self._start - sum(end - start for start, end in self._taken)

    def take(self, size_bytes: int) -> int | None:
        """The start of a free range, or None if there is no room."""
        size = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES + self._guard_bytes
        for begin in (self._next, self._start):
            at = self._fit(begin, size)
            if at is not None:
                bisect.insort(self._taken, (at, at + size))
                if self._rotate:
                    self._next = at + size
                return at
        return None

    def _fit(self, begin: int, size: int) -> int | None:
        at = begin
        for start, end in self._taken:
            if start >= at + size:
                break
            at = max(at, end)
        return at if at + size <= self._end else None

    def give_back(self, start: int) -> None:
        """A range is free again. :raises KeyError: it was not taken."""
        place = bisect.bisect_left(self._taken, (start, 0))
        if place == len(self._taken) or self._taken[place][0] != start:
            raise KeyError(start)
        del self._taken[place]
