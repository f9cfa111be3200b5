# SPDX-License-Identifier: Apache-2.0
"""Which devices of a rack a suite uses: pairs of peers, one for each kind of path. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

from testbed.topology.model import Gpu, Node, Topology
from testbed.topology.oracle import Route, hardware_route, ports_above, redirecting_ports
from testbed.topology.plan import Function, NodePlan, RackPlan, Role

_MAX_PAIRS = 3


@dataclass(frozen=True)
class Pair:
    """``requester`` does DMA to ``peer``, another device's video memory.

    ``local`` is the requester's own video memory, or None for a NIC, which uses guest memory.
    ``path`` says what lies between them, ``route`` who decides about a bus address.
    """

    node: str
    requester: Function
    local: Function | None
    peer: Function
    path: str
    route: Route = Route.ROOT

    def __str__(self) -> str:
        return f"{self.requester.device}-{self.peer.device}"

    @property
    def functions(self) -> tuple[Function, ...]:
        """All that it takes."""
        return (self.requester, self.peer) + ((self.local,) if self.local else ())


@dataclass(frozen=True)
class Doorbell:
    """``requester`` rings ``page``, another device's registers, by writing four bytes there."""

    node: str
    requester: Function
    page: Function

    def __str__(self) -> str:
        return f"{self.requester.device}-{self.page.device}"

    @property
    def functions(self) -> tuple[Function, ...]:
        """All that it takes."""
        return (self.requester, self.page)


def pairs(plan: RackPlan) -> tuple[Pair, ...]:
    """For each node the first pair of each kind of path; GPUs before NICs, igb before edu."""
    return tuple(
        pair
        for name, node in plan.nodes.items()
        for pair in _pairs_of(node, plan.topology.nodes[name])
    )


def doorbells(plan: RackPlan, topology: Topology) -> tuple[Doorbell, ...]:
    """For each node one doorbell page, rung by its first GPU and by a NIC, as there are."""
    found = []
    for node in plan.nodes.values():
        memories = {f.device for f in node.by_role(Role.VRAM)}
        engines = node.by_role(Role.ENGINE)
        gpu = next((f for f in engines if f.device in memories), None)
        nic = next((f for f in engines if f.device not in memories), None)
        pages = list(_doorbell_pages(node, topology))
        page = next((f for f in pages if gpu and f.device != gpu.device), None)
        ringers = [gpu, nic] if page else [nic]
        page = page or next(iter(pages), None)
        found += [Doorbell(node.name, r, page) for r in ringers if r and page]
    return tuple(found)


def path_between(node: NodePlan, one: Function, other: Function) -> str:
    """``same slot``, ``switch sw0``, ``root port rp0``, or ``root complex``: where they meet."""
    if one.device == other.device:
        return "same slot"
    ours = ports_above(node, one)
    common = next((port for port in ports_above(node, other) if port in ours), None)
    if common is None:
        return "root complex"
    kind = "root port" if common.role is Role.ROOT_PORT else "switch"
    return f"{kind} {common.device}"


def route_between(node: NodePlan, spec: Node, requester: Function, peer: Function) -> Route:
    """Who decides about a request of ``requester`` by the bus address of ``peer``."""
    return hardware_route(node, requester, peer, redirecting_ports(node, spec))


def _pairs_of(node: NodePlan, spec: Node) -> Iterator[Pair]:
    engines = [f for f in node.functions if f.role is Role.ENGINE]
    memories = {f.device: f for f in node.by_role(Role.VRAM)}
    gpus = [f for f in engines if f.device in memories]
    nics = sorted((f for f in engines if f.device not in memories), key=lambda f: f.kind == "edu")
    candidates = [
        *((one, other) for one, other in permutations(gpus, 2)),
        *((nic, gpu) for nic in nics for gpu in gpus),
    ]
    chosen: dict[object, Pair] = {}
    for requester, other in candidates:
        peer = memories[other.device]
        path = path_between(node, requester, peer)
        route = route_between(node, spec, requester, peer)
        # Two GPUs below a switch are the same case whichever switch it is.
        kind = (route, len(ports_above(node, requester)), len(ports_above(node, peer)))
        slow_repeat = requester.kind == "edu" and chosen
        if kind not in chosen and not slow_repeat and len(chosen) < _MAX_PAIRS:
            local = memories.get(requester.device)
            chosen[kind] = Pair(node.name, requester, local, peer, path, route)
    yield from chosen.values()


def _doorbell_pages(node: NodePlan, topology: Topology) -> Iterator[Function]:
    """Functions that have a GPU's doorbell among their registers: its own, or its engine."""
    wanted = {
        entry.name
        for entry in topology.nodes[node.name].entries()
        if isinstance(entry, Gpu) and entry.doorbell
    }
    for function in node.functions:
        if function.device in wanted and function.kind in ("edu", "model"):
            yield function
