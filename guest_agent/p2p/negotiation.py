# SPDX-License-Identifier: Apache-2.0
"""One core function matches exporter and importer; no driver does.

Sources: the discussion of 2025-09 on dma-buf interconnects, and the RFC of 2026-02-17 "DMA-buf
mapping types" (``dma_buf_match_mapping``), whose errno rules hold for every policy here.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Protocol

from guest_agent.p2p.errors import AbortedError, NoPathError
from guest_agent.p2p.interconnect import Kind, NoWay, Placement
from guest_agent.p2p.matching import Matching
from guest_agent.p2p.report import Refusal, Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from guest_agent.p2p.events import Recorder
    from guest_agent.p2p.interconnect import Offer, Path, Topology
    from guest_agent.p2p.matching import Pair
    from guest_agent.p2p.policies import Policy

    Check = Callable[[Path], Refusal | None]

_REPORTED_LOSERS = 50


class Forwarder(Protocol):
    """Asks whoever knows the far end of a virtual interconnect: the host."""

    def forward(self, path: Path) -> Refusal | None:
        """None if the host agrees; its errno and reason otherwise.

        :raises OSError: the host or the node behind it did not answer; ends the negotiation
            with that errno.
        """
        ...


@dataclass(frozen=True)
class Outcome:
    """What was agreed, and the report of how."""

    path: Path
    report: Report


def negotiate(
    topology: Topology,
    exporter: Sequence[Offer],
    importer: Sequence[Offer],
    policy: Policy,
    *,
    allowed: Collection[Placement] = tuple(Placement),
    check: Check | None = None,
    forwarder: Forwarder | None = None,
) -> Outcome:
    """Choose one path for an attachment. Equal lists give the same choice.

    :param exporter: what the exporter offers, in the order of its priority.
    :param allowed: placements that every active importer reaches.
    :param check: the drivers' own word on a candidate, asked in the policy's order.
    :param forwarder: for candidates of type ``virtual``; without one they are not supported.
    :raises NoPathError: EINVAL: nothing is left.
    :raises AbortedError: a candidate failed with an errno other than EOPNOTSUPP.
    """
    matching = Matching(topology, exporter, importer, allowed)
    report = Report(policy, matching)
    for pair in _in_order(matching, policy):
        path = matching.lookup(pair)
        if isinstance(path, NoWay):
            continue
        refused = _ask(path, check, forwarder)
        if refused is None:
            report.chosen = pair
            return Outcome(path, report)
        report.refused[pair] = refused
        if refused.code != errno.EOPNOTSUPP:
            report.aborted = pair
            raise AbortedError(f"{path}: {refused.reason}", refused.code, report)
    names = f"{_devices(exporter)} and {_devices(importer)}"
    raise NoPathError(f"{names} have no way in common under {policy.name}", report)


def noted(events: Recorder, subject: str, decide: Callable[[], Outcome]) -> Outcome:
    """A negotiation as an event, which has the report also of one that failed."""
    with events.span("negotiate", subject) as span:
        try:
            outcome = decide()
        except OSError as error:
            report = getattr(error, "report", None)
            if report is not None:
                span.details.update(report.as_json(_REPORTED_LOSERS))
            raise
        span.details.update(outcome.report.as_json(_REPORTED_LOSERS))
        return outcome


def _in_order(matching: Matching, policy: Policy) -> Iterator[Pair]:
    if not policy.by_quality:
        yield from matching.listed()
        return
    for kinds in policy.stages_of(matching.exporter):
        yield from matching.ranked(kinds)


def _ask(path: Path, check: Check | None, forwarder: Forwarder | None) -> Refusal | None:
    try:
        refused = check(path) if check is not None else None
        if refused is None and path.kind is Kind.VIRTUAL:
            if forwarder is None:
                return Refusal(
                    errno.EOPNOTSUPP,
                    "what a virtual interconnect leads to is known to the host, and nothing"
                    " forwards the question",
                )
            refused = forwarder.forward(path)
    except OSError as error:
        return Refusal(error.errno or errno.EIO, f"{type(error).__name__}: {error}")
    return refused


def _devices(offers: Sequence[Offer]) -> str:
    return ", ".join(dict.fromkeys(offer.device for offer in offers[:8])) or "nothing"
