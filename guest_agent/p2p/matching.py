# SPDX-License-Identifier: Apache-2.0
"""The table of all pairs of two lists, worked out only where someone looks.

Two lists of a thousand offers have a million pairs. Offers are indexed by type and by what both
ends must have in common, and equal ones are classed together, so that facts are asked for once a
pair of classes. Every pair can still be looked at on its own, and says why it is none.
"""

from __future__ import annotations

import heapq

from guest_agent.p2p.interconnect import Kind, NoWay, Path, quality

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence

    from guest_agent.p2p.interconnect import Offer, Placement, Quality, Topology

    Pair = tuple[int, int]  # indices into the exporter's and the importer's list


class Matching:
    """The pairs of two lists on one machine.

    :param allowed: the placements that the buffer may have (what its active importers reach).
    """

    def __init__(
        self,
        topology: Topology,
        exporter: Sequence[Offer],
        importer: Sequence[Offer],
        allowed: Collection[Placement],
    ) -> None:
        self.exporter = tuple(exporter)
        self.importer = tuple(importer)
        self._topology = topology
        self._allowed = tuple(allowed)
        self._known: dict[tuple[int, int, bool], Path | NoWay] = {}
        self._meeting_e, self._class_e = self._index(self.exporter)
        self._meeting_i, self._class_i = self._index(self.importer)
        self._partners: dict[Hashable, list[int]] = {}
        self._met = set(self._meeting_e)
        for index, meeting in enumerate(self._meeting_i):
            self._partners.setdefault(meeting, []).append(index)

    def _index(self, offers: Sequence[Offer]) -> tuple[list[Hashable], list[int]]:
        classes: dict[Hashable, int] = {}
        meetings: list[Hashable] = []
        numbers: list[int] = []
        for offer in offers:
            common = self._topology.meeting(offer)
            place = self._topology.place(offer)
            meeting = (offer.kind, common) if common is not None else None
            sort = (meeting, place, offer.placements, offer.constraints)
            meetings.append(meeting)
            numbers.append(classes.setdefault(sort, len(classes)))
        return meetings, numbers

    def partners(self, exporter_index: int) -> Sequence[int]:
        """The importer's offers that this offer of the exporter can meet, in order."""
        meeting = self._meeting_e[exporter_index]
        return self._partners.get(meeting, ()) if meeting is not None else ()

    def is_met(self, side: str, index: int) -> bool:
        """Whether the other side has an offer that this one can meet; ``side`` as below."""
        if side == "exporter":
            return self._meeting_e[index] in self._partners and self.is_connected(side, index)
        return self._meeting_i[index] in self._met and self.is_connected(side, index)

    def is_connected(self, side: str, index: int) -> bool:
        """Whether that offer's port leads anywhere; ``side`` is ``exporter`` or ``importer``."""
        return (self._meeting_e if side == "exporter" else self._meeting_i)[index] is not None

    def lookup(self, pair: Pair) -> Path | NoWay:
        """The path of a pair that meets, or why there is none."""
        found = self._of_class(pair)
        if isinstance(found, NoWay):
            return found
        return Path(self.exporter[pair[0]], self.importer[pair[1]], found.placement, found.facts)

    def _of_class(self, pair: Pair) -> Path | NoWay:
        """As :meth:`lookup`, of the first pair of these classes that was looked at."""
        first, second = pair
        itself = self.exporter[first].device == self.importer[second].device
        key = (self._class_e[first], self._class_i[second], itself)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._work_out(self.exporter[first], self.importer[second])
        return found

    def _work_out(self, exporter: Offer, importer: Offer) -> Path | NoWay:
        common = [each for each in exporter.placements if each in importer.placements]
        if not common:
            reaches = " or ".join(each.value for each in importer.placements)
            return NoWay(f"the importer reaches only {reaches} memory over it")
        possible = [each for each in common if each in self._allowed]
        if not possible:
            return NoWay(f"active importers do not reach {common[0].value} memory")
        facts = self._topology.facts(exporter, importer, possible[0])
        if isinstance(facts, NoWay):
            return facts
        path = Path(exporter, importer, possible[0], facts)
        reason = refusal(path)
        return NoWay(reason) if reason else path

    def listed(self) -> Iterator[Pair]:
        """The pairs that have a path, in the order of the lists."""
        for first in range(len(self.exporter)):
            for second in self.partners(first):
                if not isinstance(self._of_class((first, second)), NoWay):
                    yield first, second

    def ranked(self, kinds: Collection[Kind]) -> Iterator[Pair]:
        """The pairs of these types that have a path, best first; equals in the lists' order."""
        groups: dict[Quality, list[Iterable[Pair]]] = {}
        for members, partners in self._class_pairs(kinds):
            own, others = _split(self.exporter, self.importer, members, partners)
            for sample, pairs in ((own[:1], own), (_first(others()), others())):
                for pair in sample:
                    found = self._of_class(pair)
                    if not isinstance(found, NoWay):
                        rank = quality(found.kind, found.placement, found.facts)
                        groups.setdefault(rank, []).append(pairs)
        for rank in sorted(groups):
            yield from heapq.merge(*groups[rank])

    def _class_pairs(self, kinds: Collection[Kind]) -> Iterator[tuple[list[int], list[int]]]:
        left = _grouped(self._meeting_e, self._class_e)
        right = _grouped(self._meeting_i, self._class_i)
        for meeting, classes in left.items():
            if meeting in right and self.exporter[next(iter(classes.values()))[0]].kind in kinds:
                for members in classes.values():
                    for partners in right[meeting].values():
                        yield members, partners


def _grouped(
    meetings: Sequence[Hashable], classes: Sequence[int]
) -> dict[Hashable, dict[int, list[int]]]:
    grouped: dict[Hashable, dict[int, list[int]]] = {}
    for index, (meeting, number) in enumerate(zip(meetings, classes, strict=True)):
        if meeting is not None:
            grouped.setdefault(meeting, {}).setdefault(number, []).append(index)
    return grouped


class _Others:
    """The pairs of two classes whose ends are different devices, in order, as often as asked."""

    def __init__(
        self,
        exporter: Sequence[Offer],
        importer: Sequence[Offer],
        members: list[int],
        partners: list[int],
    ) -> None:
        self._lists = (exporter, importer, members, partners)

    def __call__(self) -> Iterator[Pair]:
        exporter, importer, members, partners = self._lists
        for first in members:
            device = exporter[first].device
            for second in partners:
                if importer[second].device != device:
                    yield first, second


def _split(
    exporter: Sequence[Offer], importer: Sequence[Offer], members: list[int], partners: list[int]
) -> tuple[list[Pair], _Others]:
    """The pairs of a device with itself, which are a class of their own, and all the others."""
    by_device: dict[str, list[int]] = {}
    for second in partners:
        by_device.setdefault(importer[second].device, []).append(second)
    own = [(a, b) for a in members for b in by_device.get(exporter[a].device, ())]
    return own, _Others(exporter, importer, members, partners)


def _first(pairs: Iterator[Pair]) -> list[Pair]:
    for pair in pairs:
        return [pair]
    return []


def refusal(path: Path) -> str:
    """Why the type's own match function says EOPNOTSUPP, or "".

    The peer-to-peer rule of scatter lists is the RFC's of 2026-02 (``dma_buf_sgt_match``).
    """
    ours, theirs = path.exporter.constraints, path.importer.constraints
    if theirs.needs_cpu and not ours.allows_cpu:
        return "the importer needs the CPU to reach the memory, and the exporter forbids that"
    if path.kind is Kind.SCATTER_LIST and ours.requires_p2p:
        if not theirs.accepts_p2p:
            return "the importer accepts no peer-to-peer scatter list"
        if path.facts.distance < 0:
            return f"peer-to-peer distance {path.facts.distance}"
    if not path.facts.iommu and ours.top_address >> theirs.address_bits:
        return (
            f"the memory ends at {ours.top_address:#x}, beyond the {theirs.address_bits} bits of"
            " the importer's DMA mask"
        )
    return ""
