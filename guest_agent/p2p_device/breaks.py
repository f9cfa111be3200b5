# SPDX-License-Identifier: Apache-2.0
"""Deliberate breaks of the core, so that a suite can be seen to FAIL.

Each takes out one thing that the protocols promise, until :func:`mend`.
"""

from __future__ import annotations

from guest_agent.p2p import attachment, buffer, graph, hmm, moves, negotiation, odp
from guest_agent.p2p.errors import NoPathError
from guest_agent.p2p.report import Refusal
from guest_agent.p2p_device import backend
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any


_whole: list[tuple[Any, str, object]] = []  # what was there before, in the order of breaking


def _put(where: Any, name: str, value: object) -> None:
    """Put something else in the place of a function or property."""
    _whole.append((where, name, vars(where)[name]))
    setattr(where, name, value)


def mend() -> None:
    """Undo every break."""
    while _whole:
        setattr(*_whole.pop())


def _first_offer() -> None:
    """The importer's first offer wins, whatever the exporter and the facts say."""

    def in_order(matching: Any, _: object) -> Iterator[tuple[int, int]]:
        yield from sorted(matching.listed(), key=lambda pair: (pair[1], pair[0]))

    _put(negotiation, "_in_order", in_order)


def _swallow_errno() -> None:
    """Any errno of a candidate goes on to the next."""
    ask = negotiation._ask

    def swallow(*args: Any) -> Refusal | None:
        refused = ask(*args)
        return refused and Refusal(95, refused.reason)

    _put(negotiation, "_ask", swallow)


def _skip_fence() -> None:
    """Importers' accesses do not wait for fences of memory management."""

    def address(self: attachment.Mapping) -> Any:
        self.check()
        return self.live.address

    add = graph.Graph.add

    def add_at_once(
        self: graph.Graph, name: str, begin: Any, after: Any = (), needs: Any = (), *more: Any
    ) -> Any:
        waits = (after, needs) if name.startswith("copy of") else ((), ())
        return add(self, name, begin, *waits, *more)

    _put(attachment.Mapping, "address", property(address))
    _put(attachment.Mapping, "is_future", property(lambda _: False))
    _put(graph.Graph, "add", add_at_once)


def _strand_importer() -> None:
    """A move does not ask whether the active importers reach the new place."""
    right = moves.paths_after

    def paths(of: Any, placement: Any) -> Sequence[Any]:
        try:
            return right(of, placement)
        except NoPathError:
            return [(each, each.path) for each in of.attachments]

    _put(moves, "paths_after", paths)


def _ignore_pin() -> None:
    """Pins keep nothing in place."""
    _put(buffer.Buffer, "pinned_by", lambda _: [])


def _half_move() -> None:
    """A list of buffers is moved one by one, as far as it goes."""

    def one_by_one(task: Any, wanted: Any, cause: int = 0) -> list[Any]:
        return [
            moves._commit(moves._prepare(each, task, placement), task, cause)
            for each, placement in wanted
        ]

    _put(moves, "move_all", one_by_one)


def _keep_mapping() -> None:
    """What the core unmaps stays in the tables of IOMMU and link until it is mapped anew."""
    whole = backend.DeviceBackend
    unmap, map_ = whole.unmap, whole.map
    stale: dict[tuple[str, int], tuple[Any, ...]] = {}

    def remember(self: backend.DeviceBackend, backing: Any, path: Any, address: Any) -> None:
        stale[address.user, address.value] = (self, backing, path, address)

    def anew(
        self: backend.DeviceBackend, backing: Any, path: Any, address: Any, *, writable: bool
    ) -> None:
        before = stale.pop((address.user, address.value), None)
        if before is not None:
            unmap(*before)
        map_(self, backing, path, address, writable=writable)

    _put(whole, "unmap", remember)
    _put(whole, "map", anew)
    _put(whole, "release", lambda *_: None)


def _no_keep_alive() -> None:
    """Page faults install no keep-alive fence."""
    init = odp.OnDemand.__init__

    def without(self: odp.OnDemand, *args: Any) -> None:
        kept = list(args)
        kept[3:4] = [0]
        init(self, *kept)

    _put(odp.OnDemand, "__init__", without)


def _any_owner() -> None:
    """A device joins the first group that has any member it is linked to."""

    def join(self: hmm.OwnerGroups, device: str) -> int:
        for number, members in enumerate(self._groups):
            if any(self._linked(device, member) for member in members):
                members.append(device)
                return number
        self._groups.append([device])
        return len(self._groups) - 1

    _put(hmm.OwnerGroups, "join", join)


def _one_address() -> None:
    """Every device that mirrors a page is given the address of the first."""
    fault = hmm.Mirror.fault

    def same(self: hmm.Mirror, device: str) -> Any:
        address = fault(self, device)
        tables = list(self._tables.values())
        return tables[0][1] if tables and address is not None else address

    _put(hmm.Mirror, "fault", same)


def _allow_cycle() -> None:
    """A cycle of operations is not seen."""
    _put(graph.Graph, "_way", lambda *_: [])


BREAKS: dict[str, Callable[[], None]] = {
    "first-offer": _first_offer,
    "swallow-errno": _swallow_errno,
    "skip-fence": _skip_fence,
    "strand-importer": _strand_importer,
    "ignore-pin": _ignore_pin,
    "half-move": _half_move,
    "keep-mapping": _keep_mapping,
    "no-keep-alive": _no_keep_alive,
    "any-owner": _any_owner,
    "one-address": _one_address,
    "allow-cycle": _allow_cycle,
}


def apply(name: str) -> None:
    """Break something; "" breaks nothing. :raises ParameterError: there is no such break."""
    if not name:
        return
    if name not in BREAKS:
        raise ParameterError(f"broken: {name!r} is none of {', '.join(BREAKS)}")
    BREAKS[name]()
