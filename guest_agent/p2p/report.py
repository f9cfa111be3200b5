# SPDX-License-Identifier: Apache-2.0
"""What a negotiation looked at, and for each candidate the reason why it lost (NEG-11).

Reasons are worked out when someone reads them, so that a report costs nothing until then and still
has every pair.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from guest_agent.p2p.interconnect import NoWay, why_worse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from guest_agent.p2p.interconnect import Kind, Path
    from guest_agent.p2p.matching import Matching, Pair
    from guest_agent.p2p.policies import Policy


@dataclass(frozen=True)
class Candidate:
    """One pair of offers of one type that meet.

    ``path``    what it would have been; None if there is none.
    ``reason``  why it lost; "" for the one that won.
    """

    exporter_index: int
    importer_index: int
    path: Path | None
    reason: str


@dataclass(frozen=True)
class Unmatched:
    """An offer that meets none of the other side."""

    side: str  # exporter or importer
    index: int
    reason: str


@dataclass(frozen=True)
class Refusal:
    """A driver's or the host's word on a pair: EOPNOTSUPP goes on, any other errno ends it."""

    code: int
    reason: str


class Report:
    """The lists, the policy, the choice, and why each of the others lost."""

    def __init__(self, policy: Policy, matching: Matching) -> None:
        self.policy = policy
        self.chosen: Pair | None = None
        self.aborted: Pair | None = None
        self.refused: dict[Pair, Refusal] = {}
        self._matching = matching
        self._stage = {
            kind: number
            for number, kinds in enumerate(policy.stages_of(matching.exporter))
            for kind in kinds
        }

    @property
    def path(self) -> Path | None:
        """The path that was chosen."""
        if self.chosen is None:
            return None
        found = self._matching.lookup(self.chosen)
        return None if isinstance(found, NoWay) else found

    def candidates(self) -> Iterator[Candidate]:
        """Every pair that meets, in the order of the lists."""
        matching = self._matching
        for first in range(len(matching.exporter)):
            for second in matching.partners(first):
                yield self.candidate((first, second))

    def candidate(self, pair: Pair) -> Candidate:
        """One pair that meets, by its places in the lists."""
        found = self._matching.lookup(pair)
        if isinstance(found, NoWay):
            return Candidate(*pair, None, found.reason)
        return Candidate(*pair, found, self._why_lost(pair, found))

    def unmatched(self) -> Iterator[Unmatched]:
        """The offers that meet none of the other side's."""
        matching = self._matching
        for side, mine, others in (
            ("exporter", matching.exporter, matching.importer),
            ("importer", matching.importer, matching.exporter),
        ):
            kinds = {offer.kind for offer in others}
            other = "importer" if side == "exporter" else "exporter"
            for index, offer in enumerate(mine):
                if matching.is_met(side, index):
                    continue
                if not matching.is_connected(side, index):
                    reason = f"{offer} is not connected"
                elif offer.kind not in kinds:
                    reason = f"the {other} does not offer {offer.kind.value}"
                else:
                    reason = f"nothing that the {other} offers is at the other end of it"
                yield Unmatched(side, index, reason)

    def _why_lost(self, pair: Pair, path: Path) -> str:
        if pair in self.refused:
            return self.refused[pair].reason
        if self.aborted is not None:
            return f"not tried: {self.refused[self.aborted].reason} ended the negotiation"
        winner = self.path
        if self.chosen is None or winner is None or pair == self.chosen:
            return ""
        if self._stage[path.kind] != self._stage[winner.kind]:
            return f"{self._stage_reason(winner.kind)} {path.kind.value}"
        worse = why_worse(path.quality, winner.quality) if self.policy.by_quality else ""
        if not worse and pair[0] != self.chosen[0]:
            worse = f"the exporter lists {winner.exporter} first"
        return worse or f"the importer lists {winner.importer} first"

    def _stage_reason(self, won: Kind) -> str:
        if self.policy.stages == "exporter":
            return f"the exporter lists {won.value} before"
        return f"{won.value} is tried before"

    def lines(self, limit: int = 100) -> Iterator[str]:
        """The report as text, the choice first, at most ``limit`` of the others."""
        yield f"policy {self.policy.name}: {self.path or 'nothing was chosen'}"
        lost = (each for each in self.candidates() if each.reason)
        for each in itertools.islice(lost, limit):
            exporter = self._matching.exporter[each.exporter_index]
            importer = self._matching.importer[each.importer_index]
            yield f"  {exporter} → {importer}: {each.reason}"
        for alone in itertools.islice(self.unmatched(), limit):
            offers = getattr(self._matching, alone.side)
            yield f"  {alone.side}'s {offers[alone.index]}: {alone.reason}"

    def as_json(self, limit: int = 1000) -> dict[str, Any]:
        """``{policy, chosen, pairs, lost}``: how many pairs meet, and the first of those that lost.

        ``chosen`` may be None.
        """
        pairs = sum(len(self._matching.partners(i)) for i in range(len(self._matching.exporter)))
        return {
            "policy": self.policy.name,
            "chosen": str(self.path) if self.path else None,
            "pairs": pairs,
            "lost": [line.strip() for line in itertools.islice(self.lines(limit), 1, limit)],
        }
