# SPDX-License-Identifier: Apache-2.0
"""The devices of a rack that are peers of one another, and how far apart they are. Pure.

The words are those of ``nvidia-smi topo -m``, whose users know them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from testbed.topology.model import Topology
from testbed.topology.oracle import ports_above
from testbed.topology.plan import MODEL_KINDS, Function, NodePlan, RackPlan, Role

# Private links, as `NV4` is four NVLinks to nvidia-smi: the number is the link's width.
LINK_WORDS = {"nvlink": "NV", "xgmi": "XG", "xelink": "XL", "ual": "UA"}
LINK_NAMES = {"nvlink": "NVLink", "xgmi": "XGMI", "xelink": "Xe Link", "ual": "UALink"}


class Near(StrEnum):
    """How two devices are joined by PCIe."""

    SELF = "X"
    ONE_SWITCH = "PIX"
    SWITCHES = "PXB"
    HOST_BRIDGE = "PHB"
    SYSTEM = "SYS"


@dataclass(frozen=True)
class Peer:
    """A device that does DMA, has memory for others, or both.

    ``client`` is the function that does DMA; ``provider`` the one that has the memory, or None.
    """

    node: str
    name: str  # unique in the rack
    kind: str  # gpu, nic, nvme, device, passthrough
    client: Function
    provider: Function | None

    @property
    def routes(self) -> bool:
        """Its requests go as its switches route them; QEMU sends those of its own devices up."""
        return self.client.kind in MODEL_KINDS

    @property
    def lacks_memory(self) -> str:
        """Why nothing can be said of its memory, if it has none."""
        what = {"nic": "a NIC", "device": "a device of your own"}.get(self.kind, self.name)
        return f"{what} has no memory for peers"

    @property
    def copies(self) -> bool:
        """It is an engine that the testbed can tell to copy."""
        return self.client.role is Role.ENGINE


_KINDS = {Role.PASSTHROUGH: "passthrough", Role.DEVICE: "device"}
_ORDER = ("gpu", "nic", "nvme", "passthrough", "device")


def peers(plan: RackPlan) -> tuple[Peer, ...]:
    """GPUs, NICs, disks with memory of their own, and others; named ``node/device`` in a rack of
    several machines."""
    several = len(plan.nodes) > 1
    found = [
        Peer(node.name, f"{node.name}/{device}" if several else device, kind, client, provider)
        for node in plan.nodes.values()
        for device, kind, client, provider in _peers_of(node)
    ]
    return tuple(sorted(found, key=lambda peer: _ORDER.index(peer.kind)))


def _peers_of(node: NodePlan) -> Iterator[tuple[str, str, Function, Function | None]]:
    memories = {f.device: f for f in node.by_role(Role.VRAM)}
    for function in node.functions:
        if function.role is Role.ENGINE:
            kind = "gpu" if function.device in memories else "nic"
            yield function.device, kind, function, memories.get(function.device)
        elif function.role is Role.NVME and function.options["cmb_bytes"]:
            yield function.device, "nvme", function, function
        elif function.role in (Role.PASSTHROUGH, Role.DEVICE):
            yield function.device, _KINDS[function.role], function, None


@dataclass(frozen=True)
class TreeWay:
    """From one function up to the bridge that two have in common, and down to the other.

    ``common`` is None if they meet in the root complex only, and in neither part.
    """

    up: tuple[Function, ...]
    common: Function | None
    down: tuple[Function, ...]

    @property
    def distance(self) -> int:
        """Steps, as Linux counts them (``calc_map_type_and_dist``)."""
        return len(self.up) + len(self.down)


def way_between(node: NodePlan, one: Function, other: Function) -> TreeWay:
    """The way through the PCI tree."""
    mine = [one, *ports_above(node, one)]
    theirs = [other, *ports_above(node, other)]
    common = next((step for step in mine if step in theirs), None)
    if common is not None:
        mine, theirs = mine[: mine.index(common)], theirs[: theirs.index(common)]
    return TreeWay(tuple(mine), common, tuple(reversed(theirs)))


def nearness(node: NodePlan, one: Function, other: Function) -> Near:
    """How many switches lie between two devices of a node, if PCIe's tree joins them at all."""
    if one.device == other.device:
        return Near.SELF
    way = way_between(node, one, other)
    if way.common is None:
        return Near.HOST_BRIDGE
    ports = (*way.up[1:], way.common, *way.down[:-1])
    switches = {port.device for port in ports if port.role is not Role.ROOT_PORT}
    return Near.ONE_SWITCH if len(switches) <= 1 else Near.SWITCHES


def link_word(topology: Topology, one: Peer, other: Peer) -> str:
    """``NV12``, or "" if no private link joins them; of several kinds all are named."""
    ends = {f"{peer.node}/{peer.client.device}" for peer in (one, other)}
    return "+".join(
        f"{LINK_WORDS[link.kind]}{link.width}"
        for link in topology.links
        if set(link.between) == ends
    )
