# SPDX-License-Identifier: Apache-2.0
"""What each negotiation policy would choose for one pair of devices, from a rack's plan. Pure.

The protocol core itself is asked (:mod:`guest_agent.p2p`), with the offers of a driver whose device
has links, PCIe and RAM. A policy that goes by lists depends on how drivers order them, one that
goes by facts does not: so each is asked twice, fastest first and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guest_agent.p2p.errors import NoPathError
from guest_agent.p2p.interconnect import Facts, Kind, Offer, Placement
from guest_agent.p2p.negotiation import negotiate
from guest_agent.p2p.policies import BEST_QUALITY, POLICIES, Policy
from guest_agent.p2p.topology import Fabric, TableTopology, topology_from
from testbed.topology.interconnects import links_of, offers_of, tables
from testbed.topology.peers import Peer
from testbed.topology.plan import RackPlan, Role

NOTHING = "nothing in common"


@dataclass(frozen=True)
class Choice:
    """What one policy makes of a pair.

    ``chosen``    with both lists fastest first; ``backwards`` with both the other way round.
    ``lost``      the others, each with its reason, fastest first.
    """

    policy: str
    source: str
    chosen: str
    backwards: str
    lost: tuple[str, ...]


def compare(plan: RackPlan, requester: Peer, target: Peer) -> tuple[Choice, ...]:
    """Every policy's choice for DMA of ``requester`` to a buffer of ``target``.

    Empty if one of them takes no part: only GPUs export, and GPUs and NICs import.
    """
    if target.kind != "gpu" or requester.kind not in ("gpu", "nic"):
        return ()
    topology = _topology(plan, requester, target)
    ours, theirs = (_offers(plan, peer, requester, target) for peer in (target, requester))
    return tuple(_choice(policy, topology, ours, theirs) for policy in POLICIES.values())


def _choice(
    policy: Policy, topology: TableTopology, ours: Sequence[Offer], theirs: Sequence[Offer]
) -> Choice:
    chosen, lost = _asked(policy, topology, ours, theirs)
    backwards, _ = _asked(policy, topology, ours[::-1], theirs[::-1])
    return Choice(policy.name, policy.source, chosen, backwards, lost)


def _asked(
    policy: Policy, topology: TableTopology, ours: Sequence[Offer], theirs: Sequence[Offer]
) -> tuple[str, tuple[str, ...]]:
    try:
        report = negotiate(topology, ours, theirs, policy).report
    except NoPathError as error:
        report = error.report
    said = report.as_json()
    return str(said["chosen"] or NOTHING), tuple(said["lost"])


def _name(peer: Peer) -> str:
    return f"{peer.node}/{peer.client.device}"


def _topology(plan: RackPlan, requester: Peer, target: Peer) -> TableTopology:
    fabrics = list(_fabrics(plan, requester, target))
    if requester.node != target.node:
        return TableTopology({}, {}, (), fabrics)
    node = plan.nodes[requester.node]
    links, _ = links_of(plan, requester.node, planned=True)
    devices = [f.device for f in node.by_role(Role.ENGINE)]
    return topology_from(tables(node, plan.topology, links, devices), fabrics)


def _fabrics(plan: RackPlan, requester: Peer, target: Peer) -> Iterator[Fabric]:
    for link in plan.topology.links:
        if link.kind == "ual" and set(link.between) == {_name(requester), _name(target)}:
            devices = frozenset({_fabric_name(requester, target), _fabric_name(target, requester)})
            yield Fabric("fabric", devices, Facts(hops=1, width_lanes=link.width))


def _fabric_name(peer: Peer, other: Peer) -> str:
    """Its device; with its node, if the other is of another machine."""
    return peer.client.device if peer.node == other.node else _name(peer)


def _offers(plan: RackPlan, peer: Peer, requester: Peer, target: Peer) -> tuple[Offer, ...]:
    other = target if peer is requester else requester
    device = _fabric_name(peer, other)
    same = requester.node == target.node
    # Within one operating system physical addresses are the default, between two they are not
    # for anybody's use (the discussion of UAL, 2026-01).
    kinds = (Kind.UAL_PHYSICAL, Kind.UAL_VIRTUAL) if same else (Kind.UAL_VIRTUAL,)
    joined = any(True for _ in _fabrics(plan, requester, target))
    fabric = [Offer(kind, device) for kind in kinds if joined]
    if not same:
        return tuple(fabric)
    links, _ = links_of(plan, peer.node, planned=True)
    listed = [
        Offer(
            Kind.parse(each["kind"]),
            each["device"],
            each.get("port", ""),
            tuple(Placement(word) for word in each.get("placements", ["device"])),
        )
        for each in offers_of(links, peer.client.device)
    ]
    private = [each for each in listed if each.port]
    return (*private, *fabric, *(each for each in listed if not each.port))


def lines(choices: Sequence[Choice]) -> Iterator[str]:
    """For people, under the facts of ``testbed topo --explain``: a label and what is so."""
    label = "policies"
    for each in choices:
        yield f"{label:<12} {each.policy}: {each.chosen}"
        label = ""
        if each.backwards != each.chosen:
            yield f"{'':<12}   listed the other way round: {each.backwards}"
        if each.policy == BEST_QUALITY.name:  # the reasons that are facts
            yield from (f"{'':<12}   not {line}" for line in each.lost)
