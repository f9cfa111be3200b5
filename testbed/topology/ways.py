# SPDX-License-Identifier: Apache-2.0
"""What the ways through a node's PCIe tree carry: the narrowest link's bandwidth, all latencies.

Each entry's `bandwidth` and `latency` are those of the link above it; a root port's, of the one out
of it. To memory, a transfer passes all links up to the root. To a peer's video memory it goes up
and down again; or, below a common switch that does not redirect, only as far up as that switch.
To a GPU's own, a transfer that is not sent up passes no link.
Transfers of different devices do not share a link's bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from testbed.topology.model import Entry, Gpu, Node


@dataclass(frozen=True)
class Way:
    """``bytes_per_s`` is 0 where no link of the way has a bandwidth."""

    bytes_per_s: int = 0
    latency_ns: int = 0


@dataclass(frozen=True)
class Ways:
    """One device's: to memory, and to each GPU's video memory through the root, or across."""

    memory: Way
    up: dict[str, Way]
    across: dict[str, Way]

    @property
    def are_timed(self) -> bool:
        """Whether any of them is slower than the host."""
        ways = (self.memory, *self.up.values(), *self.across.values())
        return any(way != Way() for way in ways)


def ways_of(node: Node, device: str) -> Ways:
    """The ways of the device of that name; KeyError if there is none."""
    places = {chain[-1].name: chain for chain in _chains(node.pcie, ())}
    mine = places[device]
    up: dict[str, Way] = {}
    across: dict[str, Way] = {}
    for name, theirs in places.items():
        if not isinstance(theirs[-1], Gpu):
            continue
        up[name] = _way((*mine, *theirs))
        shared = _shared(mine, theirs)
        if name == device:
            across[name] = Way()  # from function to function of one slot: by no link
        elif shared:
            across[name] = _way((*mine[shared:], *theirs[shared:]))
    return Ways(_way(mine), up, across)


def _chains(entries: Sequence[Entry], above: tuple[Entry, ...]) -> Iterator[tuple[Entry, ...]]:
    """Of every entry: those above it, and itself."""
    for entry in entries:
        chain = (*above, entry)
        yield chain
        yield from _chains(entry.children, chain)


def _shared(mine: Sequence[Entry], theirs: Sequence[Entry]) -> int:
    """How many entries, counted from the root, stand above both."""
    count = 0
    for one, other in zip(mine[:-1], theirs[:-1], strict=False):
        if one is not other:
            break
        count += 1
    return count


def _way(chain: Sequence[Entry]) -> Way:
    rates = [getattr(entry, "bandwidth_bytes_per_s", None) for entry in chain]
    delays = [getattr(entry, "latency_ns", None) for entry in chain]
    return Way(min((r for r in rates if r), default=0), sum(d for d in delays if d))
