# SPDX-License-Identifier: Apache-2.0
"""Who decides, as a switch does, whether an access goes to a peer below it or up to the IOMMU.

A PCIe switch without ACS redirect sends a request whose address lies in a peer's BAR straight down
to that peer; the root complex, and so the IOMMU, never sees it (PCIe Base 6.0, 6.12). QEMU sends
everything up. A :class:`Router` is asked first, for each access of a model. The one that racks use
is :class:`testbed.models.live_routes.LiveRouter`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from testbed.errors import InputError
from testbed.models.access import AccessError, Cause, Space, Window
from testbed.models.memory import SharedMemory
from testbed.models.witness import Path

MAX_ROUTES = 4096


@dataclass(frozen=True)
class Route:
    """Bus addresses from ``address`` on that do not go up, or only for want of a way down.

    To ``memory``, from ``offset`` in it; or without memory to ``space``; or, if that is None too,
    to what only QEMU can reach.
    """

    address: int
    size_bytes: int
    memory: SharedMemory | None = None
    offset: int = 0
    space: Space | None = None

    def __post_init__(self) -> None:
        if (
            min(self.address, self.offset) < 0
            or self.size_bytes <= 0
            or (self.memory and self.offset + self.size_bytes > self.memory.size_bytes)
        ):
            raise InputError(f"the route at {self.address:#x} does not fit its memory")


class Routed(NamedTuple):
    """Where an access goes, for its first ``size_bytes``: into a peer's memory (a view), to a
    ``space`` that answers for it, or upstream (neither). ``astray``: upstream for want of a way
    down.

    The view is valid until the event loop runs again.
    """

    size_bytes: int
    view: memoryview | None = None
    target: str = ""
    space: Space | None = None
    astray: bool = False


class Router(Protocol):
    """The switches above one requester."""

    def stale(self) -> bool:
        """Whether :meth:`refresh` has to be awaited before the next access. Takes microseconds."""

    async def refresh(self) -> None:
        """Find out how the switches stand now."""

    def invalidate(self) -> None:
        """The machine may have changed: what is known of it is no longer good."""

    def forget(self) -> None:
        """The machine is gone."""

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

    def stale(self) -> bool:
        """Never: whoever keeps the table replaces it."""
        return False

    async def refresh(self) -> None:
        """Nothing to do."""

    def invalidate(self) -> None:
        """Nothing to do."""

    def forget(self) -> None:
        """Nothing to do."""

    def route(self, address: int, size_bytes: int) -> Routed:
        """See :class:`Router`."""
        after = bisect_right(self._starts, address)
        if after:
            route = self._routes[after - 1]
            within = address - route.address
            if within < route.size_bytes:
                size = min(size_bytes, route.size_bytes - within)
                if route.memory is None:
                    return Routed(size, space=route.space, astray=route.space is None)
                start = route.offset + within
                return Routed(size, route.memory.view[start : start + size], route.memory.name)
        if after < len(self._starts):
            size_bytes = min(size_bytes, self._starts[after] - address)
        return Routed(size_bytes)


class Nowhere(Space):
    """Addresses that a switch refuses (Unsupported Request, ACS violation): nothing moves, and the
    IOMMU is not asked.
    """

    path = Path.PEER

    def reach(self, address: int, size_bytes: int, *, write: bool) -> Window:
        """See :meth:`Space.reach`; the refusal comes with the access, so that it is traced."""
        del write
        return Window(size_bytes, None, self.path, "", self, address)

    async def fetch(self, address: int, size_bytes: int) -> bytes:
        """Refused."""
        del size_bytes
        raise AccessError(Cause.REFUSED, address, write=False)

    async def store(self, address: int, data: bytes) -> None:
        """Refused."""
        del data
        raise AccessError(Cause.REFUSED, address, write=True)
