# SPDX-License-Identifier: Apache-2.0
"""What the protocol core (guest_agent/p2p) is told of a node: links, facts of each path, offers.

Everything is plain data, as the agent takes it; see ``topology_from`` in
:mod:`guest_agent.p2p.topology`. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from testbed.topology.model import Topology
from testbed.topology.oracle import ingress_port, ports_above, redirecting_ports
from testbed.topology.plan import Function, NodePlan, RackPlan, Role

Offer = dict[str, Any]
LinkData = Mapping[str, Any]
PCIE_LANES = 16
NO_DISTANCE = -1


def links_of(
    plan: RackPlan, node: str, *, planned: bool = False
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], int]]:
    """The private links between GPU models of a node, as the core's tables want them; and by
    (device, port) the GPU's own number of each, which counts all of its links.

    A link is named after its ends (``gpu0-gpu1``), and so are its ports.

    :param planned: links between GPUs of other engines too, which have no wire.
    """
    links: list[dict[str, Any]] = []
    numbers: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}
    for link in plan.topology.links:
        ends = [(at, gpu) for at, _, gpu in (end.partition("/") for end in link.between)]
        if not planned and not all(_is_model(plan, *end) for end in ends):
            continue
        inside = link.kind != "ual" and all(at == node for at, _ in ends)
        name = "-".join(gpu for _, gpu in ends)
        for at, gpu in ends:
            if at != node:
                continue
            if inside:
                numbers[gpu, name] = counts.get(gpu, 0)
            counts[gpu] = counts.get(gpu, 0) + 1
        if inside:
            pairs = [[gpu, name] for _, gpu in ends]
            links.append({"kind": link.kind, "name": name, "ends": pairs, "width": link.width})
    return links, numbers


def _is_model(plan: RackPlan, node: str, device: str) -> bool:
    return any(f.kind == "model" for f in plan.nodes[node].of_device(device))


def tables(
    plan: NodePlan,
    topology: Topology,
    links: Sequence[LinkData],
    devices: Sequence[str],
    *,
    trusted: bool = True,
) -> dict[str, Any]:
    """What the core is told of the node: facts of each path, from its placement.

    :param trusted: Linux lets peers through the host bridge. If not, paths through it have a
        negative distance (``pci_p2pdma_distance``); VFIO, which maps for the models, does not ask.
    """
    spec = topology.nodes[plan.name]
    redirecting = redirecting_ports(plan, spec)
    iommu = spec.iommu.kind != "none" and spec.iommu.mode not in ("off", "passthrough")
    engines = {f.device: f for f in plan.by_role(Role.ENGINE)}
    memories = {f.device: f for f in plan.by_role(Role.VRAM)}
    pcie = []
    for exporter in devices:
        for importer in devices:
            if exporter != importer and exporter in memories:
                peer, requester = memories[exporter], engines[importer]
                facts = pcie_facts(plan, requester, peer, redirecting, iommu=iommu)
                if facts["host_bridge"] and not trusted:
                    facts["distance"] = NO_DISTANCE
                pcie.append({"exporter": exporter, "importer": importer, **facts})
    system = {
        device: {
            "hops": len(ports_above(plan, engines[device])),
            "redirects": [],
            "host_bridge": True,
            "iommu": iommu,
            "width": PCIE_LANES,
        }
        for device in devices
    }
    return {"pcie": pcie, "system": system, "links": list(links)}


def pcie_facts(
    plan: NodePlan,
    requester: Function,
    peer: Function,
    redirecting: frozenset[str],
    *,
    iommu: bool,
) -> dict[str, Any]:
    """Hops, redirects and who translates, on the way of the requester's DMA to the peer."""
    up, down = ports_above(plan, requester), ports_above(plan, peer)
    common = [port for port in up if port in down]
    ingress = ingress_port(plan, requester, peer)
    redirects = [ingress.name] if ingress is not None and ingress.bdf in redirecting else []
    host_bridge = not common or bool(redirects)
    hops = len(up) + len(down) - 2 * len(common)
    return {
        "hops": hops,
        "redirects": redirects,
        "host_bridge": host_bridge,
        "iommu": iommu and host_bridge,
        "width": PCIE_LANES,
        "distance": hops,
    }


def offers_of(links: Sequence[LinkData], device: str, *kinds: str) -> list[Offer]:
    """A device's list: its links, PCIe, RAM; of these ``kinds`` if any are named, in order.

    A NIC has no links.
    """
    own = [
        {"kind": link["kind"], "device": device, "port": port}
        for link in links
        for name, port in link["ends"]
        if name == device
    ]
    known: dict[str, list[Offer]] = {
        "link": own,
        "pcie": [{"kind": "pcie", "device": device}],
        "scatter-list": [{"kind": "scatter-list", "device": device}],
        "system": [{"kind": "system", "device": device, "placements": ["system"]}],
    }
    return [offer for kind in kinds or ("link", "pcie", "system") for offer in known[kind]]
