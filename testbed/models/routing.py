# SPDX-License-Identifier: Apache-2.0
"""Who decides, as a switch does, whether an access goes to a peer below it or up to the IOMMU.

A PCIe switch without ACS redirect sends a request whose address lies in a peer's BAR straight down
to that peer; the root complex, and so the IOMMU, never sees it (PCIe Base 5.0, 6.12). QEMU sends
everything up. A :class:`Router` is asked first, for each access of a model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from testbed.errors import InputError
from testbed.models.memory import SharedMemory

MAX_ROUTES = 1024


@dataclass(frozen=True)
class Route:
    """Bus addresses from ``address`` on that are a peer's memory, from ``offset`` in it."""

    address: int
    size_bytes: int
    memory: SharedMemory
    offset: int = 0

    def __post_init__(self) -> None:
        if (
            min(self.address, self.offset) < 0
            or self.size_bytes <= 0
            or self.offset + self.size_bytes > self.memory.size_bytes
        ):
            raise InputError(f"the route at {self.address:#x} does not fit its memory")


@dataclass(frozen=True, slots=True)
class Routed:
    """Where an access goes, for its first ``size_bytes``: a peer's memory, or upstream (no view).

    The view is valid until the event loop runs again.
    """

    size_bytes: int
    view: memoryview | None = None
    target: str = ""


class Router(Protocol):
    """The switches above one requester."""

    def route(self, address: int, size_bytes: int) -> Routed:
        """Where an access to ``address`` goes first, at most ``size_bytes`` of it."""


class TableRouter:
    """Routes by a table that someone who knows the tree, the BARs and the ACS bits keeps.

    One router belongs to one requester: its table holds only what that requester may be routed to.
    An empty table, which it starts with, sends everything upstream.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._routes: list[Route] = []

    def replace(self, routes: Sequence[Route]) -> None:
        """Take this table instead. InputError if routes overlap or are too many."""
        if len(routes) > MAX_ROUTES:
            raise InputError(f"more than {MAX_ROUTES} routes")
        ordered = sorted(routes, key=lambda route: route.address)
        for before, after in pairwise(ordered):
            if before.address + before.size_bytes > after.address:
                raise InputError(f"the routes at {after.address:#x} overlap")
        self._routes = ordered
        self._starts = [route.address for route in ordered]

    def route(self, address: int, size_bytes: int) -> Routed:
        """See :class:`Router`."""
        after = bisect_right(self._starts, address)
        if after:
            route = self._routes[after - 1]
            within = address - route.address
            if within < route.size_bytes:
                start = route.offset + within
                size = min(size_bytes, route.size_bytes - within)
                return Routed(size, route.memory.view[start : start + size], route.memory.name)
        if after < len(self._starts):
            size_bytes = min(size_bytes, self._starts[after] - address)
        return Routed(size_bytes)
