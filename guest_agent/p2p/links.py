# SPDX-License-Identifier: Apache-2.0
"""The links within one range of allocated addresses: what leads where, and what is visible.

Shared by the IOVA API and its fabric twin, whose rules on links are the same.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Link:
    """``size_bytes`` of physical memory, from ``offset`` in the range on, in whole granules."""

    offset: int
    physical: int
    size_bytes: int
    writable: bool
    visible: bool = False

    @property
    def end(self) -> int:
        """The first offset behind it."""
        return self.offset + self.size_bytes


class Links:
    """Links that do not overlap, by offset."""

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._links: list[Link] = []

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._links))

    def overlapping(self, offset: int, size_bytes: int) -> list[Link]:
        """Those with a byte in the range, by offset."""
        first = max(bisect.bisect_right(self._offsets, offset) - 1, 0)
        found = []
        for link in self._links[first:]:
            if link.offset >= offset + size_bytes:
                break
            if link.end > offset:
                found.append(link)
        return found

    def add(self, link: Link) -> None:
        """Add one that overlaps none."""
        at = bisect.bisect(self._offsets, link.offset)
        self._offsets.insert(at, link.offset)
        self._links.insert(at, link)

    def remove(self, link: Link) -> None:
        """Take one out."""
        at = bisect.bisect_left(self._offsets, link.offset)
        del self._offsets[at], self._links[at]

    def show(self, link: Link) -> None:
        """Mark one as visible."""
        self._links[bisect.bisect_left(self._offsets, link.offset)] = replace(link, visible=True)

    def are_exactly(self, offset: int, size_bytes: int) -> bool:
        """Whether links cover the range without a hole, and none of them goes beyond it."""
        covered = offset
        for link in self.overlapping(offset, size_bytes):
            if link.offset != covered:
                return False
            covered = link.end
        return covered == offset + size_bytes
