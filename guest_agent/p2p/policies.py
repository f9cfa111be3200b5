# SPDX-License-Identifier: Apache-2.0
"""In which order candidates are tried: the proposals, as values that can be compared.

What they have in common: the core matches, a candidate's EOPNOTSUPP goes on to the next, any other
errno ends the negotiation, and no candidate left is EINVAL.
"""

from __future__ import annotations

from dataclasses import dataclass

from guest_agent.p2p.errors import P2PError, unknown
from guest_agent.p2p.interconnect import FABRIC_KINDS, PRIVATE_KINDS, Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest_agent.p2p.interconnect import Offer


@dataclass(frozen=True)
class Policy:
    """An order of candidates.

    ``by_quality``  within a stage the best quality comes first, and among equals the exporter's
                    list, then the importer's; otherwise the lists alone decide.
    ``stages``      which types are tried before which others: ``one`` (all at once), ``exporter``
                    (as its list names them) or ``private-first``.
    """

    name: str
    stages: str
    by_quality: bool
    source: str

    def stages_of(self, exporter: Sequence[Offer]) -> list[tuple[Kind, ...]]:
        """The types of each stage, for this exporter's list."""
        kinds = list(dict.fromkeys(offer.kind for offer in exporter))
        if self.stages == "one":
            return [tuple(kinds)] if kinds else []
        if self.stages == "exporter":
            return [(kind,) for kind in kinds]
        private = (*PRIVATE_KINDS, *FABRIC_KINDS, Kind.VIRTUAL)
        first = tuple(kind for kind in kinds if kind in private)
        rest: list[tuple[Kind, ...]] = [(kind,) for kind in kinds if kind not in private]
        return [first, *rest] if first else rest


EXPORTER_PRIORITY = Policy(
    "exporter-priority",
    "one",
    False,
    "RFC of 2026-02-17, dma-buf mapping types: the exporter's list in its order, for each entry the"
    " importer's list in its order, the first match wins",
)
MAILING_LIST = Policy(
    "mailing-list",
    "exporter",
    True,
    "discussion of 2025-09 on dma-buf interconnects: the exporter's list says which type, the"
    " quality says which of several paths",
)
BEST_QUALITY = Policy(
    "best-quality",
    "one",
    True,
    "discussion of 2025-09: N-to-M negotiation with multipath, the path of the best quality;"
    " the exporter's priority decides among equals",
)
PRIVATE_FIRST = Policy(
    "private-first",
    "private-first",
    True,
    "discussion of 2025-09: try the interconnect's own mapping, and if that fails the scatter list",
)

POLICIES = {
    policy.name: policy for policy in (EXPORTER_PRIORITY, MAILING_LIST, BEST_QUALITY, PRIVATE_FIRST)
}


def policy_of(name: str) -> Policy:
    """The policy of that name. :raises P2PError: EINVAL, with the nearest name that there is."""
    if name in POLICIES:
        return POLICIES[name]
    raise P2PError(unknown(name, "policy", POLICIES))
