# SPDX-License-Identifier: Apache-2.0
"""Deliberate breaks of the core, so that a suite can be seen to FAIL.

Each takes out one thing that the protocols promise, until :func:`mend`.
"""

from __future__ import annotations

import contextlib

from guest_agent.p2p import (
    attachment,
    buffer,
    graph,
    hmm,
    matching,
    moves,
    negotiation,
    odp,
    resv,
    revoke,
    topology,
)
from guest_agent.p2p.errors import NoPathError
from guest_agent.p2p.interconnect import PRIVATE_KINDS, Kind
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


def _new_address() -> None:
    """An address is given back with the last mapping, so that the next map finds another."""
    unmap = buffer.Buffer.unmap

    def and_forget(self: buffer.Buffer, task: Any, of: Any, mapping: Any) -> None:
        unmap(self, task, of, mapping)
        if of.live is mapping.live and not mapping.live.count:
            self.end_live(of, mapping.live)

    _put(buffer.Buffer, "unmap", and_forget)


def _one_kind() -> None:
    """All importers of a buffer use one type of interconnect: the latest ends the others' use."""
    attach = buffer.Buffer.attach

    def alone(self: buffer.Buffer, task: Any, importer: Any) -> Any:
        made = attach(self, task, importer)
        for each in self.attachments:
            if each.path.kind is not made.path.kind:
                revoke.take_away(each)
        return made

    _put(buffer.Buffer, "attach", alone)


def _no_fall_back() -> None:
    """What cannot be mapped is not tried another way."""
    _put(attachment.Attachment, "map_or_fall_back", attachment.Attachment.map)


def _unasked_host() -> None:
    """A virtual interconnect is taken without the host's word."""
    ask = negotiation._ask

    def unasked(path: Any, *others: Any) -> Refusal | None:
        return None if path.kind is Kind.VIRTUAL else ask(path, *others)

    _put(negotiation, "_ask", unasked)


def _any_scatter_list() -> None:
    """A scatter list is handed to whoever wants one, wherever it leads."""
    _put(matching, "refusal", lambda _: "")


def _any_link() -> None:
    """Links of one type meet, whatever they are connected to."""
    meeting = topology.TableTopology.meeting

    def anywhere(self: topology.TableTopology, offer: Any) -> Any:
        found = meeting(self, offer)
        return offer.kind.value if found and offer.kind in PRIVATE_KINDS else found

    _put(topology.TableTopology, "meeting", anywhere)


def _trust_static() -> None:
    """Whoever wants device memory gets it, also who cannot let go of it."""
    _put(buffer.Buffer, "_suited", lambda self, _: list(self.placements))


def _believe_importer() -> None:
    """A mapping that could not be made counts as made."""
    whole = backend.DeviceBackend
    map_, unmap = whole.map, whole.unmap

    def believe(self: backend.DeviceBackend, *args: Any, writable: bool) -> None:
        with contextlib.suppress(OSError):
            map_(self, *args, writable=writable)

    def forget(self: backend.DeviceBackend, *args: Any) -> None:
        with contextlib.suppress(OSError):
            unmap(self, *args)

    _put(whole, "map", believe)
    _put(whole, "unmap", forget)


def _unmap_again() -> None:
    """Who unmaps what it has unmapped is not told."""
    unmap = buffer.Buffer.unmap

    def again(self: buffer.Buffer, task: Any, of: Any, mapping: Any) -> None:
        if not mapping.closed:
            unmap(self, task, of, mapping)

    _put(buffer.Buffer, "unmap", again)


def _dead_fences() -> None:
    """The fences of an importer that died stay as they are."""
    died = buffer.Buffer.importer_died

    def alone(self: buffer.Buffer, task: Any, of: Any, why: str) -> None:
        of.fences = []
        died(self, task, of, why)

    _put(buffer.Buffer, "importer_died", alone)


def _forgive_late() -> None:
    """Who does not unmap in time is named, and keeps what it has."""
    _put(revoke, "take_all_away", lambda _: None)


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


def _fault_at_once() -> None:
    """A page fault is served while the copy is under way."""
    wait = resv.Reservation.wait

    def at_once(self: resv.Reservation, clock: Any, usage: Any, *more: Any) -> None:
        if usage is not resv.Usage.KERNEL:
            wait(self, clock, usage, *more)

    _put(resv.Reservation, "wait", at_once)


def _page_over_pcie() -> None:
    """A page is never used over a link."""
    decide = hmm.decide

    def without_owner(core: Any, page: Any, device: str, _: Any, *offers: Any) -> hmm.Decision:
        return decide(core, page, device, None, *offers)

    _put(hmm, "decide", without_owner)


def _foreign_migrates() -> None:
    """A page that cannot be used over a link is migrated, though PCIe would do."""
    decide = hmm.decide

    def no_pcie(core: Any, page: Any, device: str, owner: Any, own: Any, offers: Any) -> Any:
        left = [offer for offer in offers if offer.kind is not Kind.PCIE]
        return decide(core, page, device, owner, own, left)

    _put(hmm, "decide", no_pcie)


def _migrate_unseen() -> None:
    """A page migrates, and who has it in its tables keeps the place where it was."""
    migrate = hmm.Mirror._migrate

    def unseen(self: hmm.Mirror, cause: int) -> None:
        self._tables.clear()
        migrate(self, cause)

    _put(hmm.Mirror, "_migrate", unseen)


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
    "new-address": _new_address,
    "one-kind": _one_kind,
    "no-fall-back": _no_fall_back,
    "unasked-host": _unasked_host,
    "any-scatter-list": _any_scatter_list,
    "any-link": _any_link,
    "trust-static": _trust_static,
    "forgive-late": _forgive_late,
    "believe-importer": _believe_importer,
    "unmap-again": _unmap_again,
    "dead-fences": _dead_fences,
    "skip-fence": _skip_fence,
    "strand-importer": _strand_importer,
    "ignore-pin": _ignore_pin,
    "half-move": _half_move,
    "keep-mapping": _keep_mapping,
    "no-keep-alive": _no_keep_alive,
    "fault-at-once": _fault_at_once,
    "page-over-pcie": _page_over_pcie,
    "foreign-migrates": _foreign_migrates,
    "migrate-unseen": _migrate_unseen,
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
