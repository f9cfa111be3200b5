# SPDX-License-Identifier: Apache-2.0
"""What a run's own evidence says of pairs of devices, for the peer matrix. Pure.

The kernel's decisions are in the observations of a run whose tests asked for them
(``p2p.map_types`` and ``p2p.distance``). Where bytes went is taken from judged outcomes alone: the
bytes at the destination as two witnesses read them, with the path that the device counted, or a
fault of the device and the destination unchanged. What no test showed stays unknown, with why.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from testbed.results.evidence import Access, BytesChecked, Counter, FaultSeen, MappingUsed
from testbed.results.verdicts import Outcome, Verdict
from testbed.topology.matrix import (
    Arrival,
    Decision,
    Findings,
    MapKind,
    Matrix,
    Measured,
    Pair,
    Unknown,
    Way,
    matrix,
    planned_platform,
)
from testbed.topology.peers import Peer, peers
from testbed.topology.plan import RackPlan

_KINDS = {
    "bus": MapKind.BUS,
    "iova": MapKind.IOVA,
    "physical": MapKind.PHYSICAL,
    "refused": MapKind.NONE,
}
_WROTE = re.compile(r"(?P<device>[\w./-]+) wrote by path '(?P<path>\w+)'")
_ARRIVALS = {
    "iommu": Arrival.IOMMU,
    "message": Arrival.IOMMU,
    "peer": Arrival.PEER,
}
_NOT_ASKED = Unknown("no test of this run asked the kernel about this pair")
_NOT_MEASURED = Unknown("no test of this run moved bytes between these two")


def run_matrix(
    plan: RackPlan,
    calls: Mapping[str, Iterable[Mapping[str, Any]]],
    outcomes: Sequence[Outcome],
) -> Matrix:
    """The matrix of one rack of a run.

    :param calls: each node's observations, in order.
    :param outcomes: the run's, if they are about this rack.
    """
    everyone = peers(plan)
    kernel: dict[Pair, Decision | Unknown] = {}
    for node, made in calls.items():
        kernel |= _decided([peer for peer in everyone if peer.node == node], made)
    measured = _measured(everyone, outcomes)
    pairs = [(one.name, other.name) for one in everyone for other in everyone if one is not other]
    return matrix(
        plan,
        Findings(
            {node: planned_platform(plan, node) for node in plan.nodes},
            {pair: kernel.get(pair, _NOT_ASKED) for pair in pairs},
            {pair: measured.get(pair, _NOT_MEASURED) for pair in pairs},
        ),
    )


def _decided(
    ours: Sequence[Peer], calls: Iterable[Mapping[str, Any]]
) -> dict[Pair, Decision | Unknown]:
    """What the kernel said last of each pair; it may change its mind when ACS is changed."""
    clients = {peer.client.bdf: peer for peer in ours}
    providers = {peer.provider.bdf: peer for peer in ours if peer.provider is not None}
    distances: dict[tuple[str, str], int | None] = {}
    said: dict[Pair, Decision | Unknown] = {}
    for call in calls:
        method, params, result = call.get("method"), call.get("params"), call.get("result")
        if method not in ("p2p.distance", "p2p.map_types"):
            continue
        if not isinstance(params, dict) or not isinstance(result, dict):
            continue
        provider = str(params.get("provider"))
        target = providers.get(provider)
        for bdf, value in result.items():
            requester = clients.get(bdf)
            if target is None or requester is None or requester is target:
                continue
            if method == "p2p.distance":
                distances[provider, bdf] = value if isinstance(value, int) else None
                continue
            kind = _KINDS.get(str(value.get("type"))) if isinstance(value, dict) else None
            if kind is not None:
                far = None if kind is MapKind.NONE else distances.get((provider, bdf))
                said[requester.name, target.name] = Decision(kind, far)
    return said


def _measured(
    everyone: Sequence[Peer], outcomes: Sequence[Outcome]
) -> dict[Pair, Measured | Unknown]:
    found: dict[Pair, dict[Way, Arrival]] = {}
    failed: dict[Pair, str] = {}
    for outcome in outcomes:
        pair = _pair_of(everyone, outcome.test)
        if pair is None or outcome.verdict is Verdict.SKIP:
            continue
        requester, target = pair
        names = (requester.name, target.name)
        if outcome.verdict is not Verdict.PASS:
            failed.setdefault(names, f"{outcome.title} ended {outcome.verdict}: {outcome.reason}")
            continue
        for way, arrival in _moves(requester, target, outcome).items():
            found.setdefault(names, {}).setdefault(way, arrival)
    known: dict[Pair, Measured | Unknown] = {pair: Measured(moves) for pair, moves in found.items()}
    # A test that failed weighs more than those that passed beside it.
    return known | {pair: Unknown(why) for pair, why in failed.items()}


def _pair_of(everyone: Sequence[Peer], test: str) -> tuple[Peer, Peer] | None:
    """A suite names the pair of a test in brackets: ``mapped_both_ways[nic0-gpu0]``."""
    words = test.rpartition("[")[2].removesuffix("]")
    for one in everyone:
        for other in everyone:
            if one is not other and f"{one.name}-{other.name}" == words:
                return one, other
    return None


def _moves(requester: Peer, target: Peer, outcome: Outcome) -> dict[Way, Arrival]:
    memory = f"{target.name}.vram+"
    seen = [
        item
        for item in outcome.evidence
        if isinstance(item, BytesChecked) and item.place.startswith(memory)
    ]
    if not seen or not all(item.equal for item in seen):
        return {}
    mapped = any(
        isinstance(item, MappingUsed) and item.source.startswith(memory)
        for item in outcome.evidence
    )
    paths = {
        match["path"]
        for item in outcome.evidence
        if isinstance(item, Counter) and item.value
        if (match := _WROTE.fullmatch(item.name)) and match["device"] == requester.name
    }
    refused = any(
        isinstance(item, FaultSeen)
        and item.requester == requester.client.bdf
        and item.access is not Access.READ
        for item in outcome.evidence
    )
    if mapped:
        # With a mapping, what faults is what the test tries beside it.
        arrivals = [_ARRIVALS[path] for path in sorted(paths) if path in _ARRIVALS]
        return {Way.IOVA: arrivals[0] if arrivals else Arrival.ARRIVED} if not refused else {}
    if refused:
        return {Way.RAW: Arrival.REFUSED}
    return {Way.RAW: Arrival.PEER} if "peer" in paths else {}
