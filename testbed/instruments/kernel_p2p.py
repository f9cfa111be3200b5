# SPDX-License-Identifier: Apache-2.0
"""What a guest's kernel says of peers, through ``p2p_probe``, and what a prediction of it rests on.

The module is loaded by who asks. It calls ``pci_p2pdma_distance_many()`` and ``dma_map_sgtable()``
and repeats no rule (``guest_agent/kmod/p2p_probe``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from testbed.instruments.interface import RackNode
from testbed.instruments.memory import PROVIDED_BYTES, VRAM_BAR
from testbed.topology.matrix import Decision, MapKind, Platform
from testbed.topology.oracle import Cpu
from testbed.topology.plan import Function, Role

MODULE = "p2p_probe"

Tree = Sequence[Mapping[str, Any]]

_KINDS = {
    "bus": MapKind.BUS,
    "iova": MapKind.IOVA,
    "physical": MapKind.PHYSICAL,
    "refused": MapKind.NONE,
}


def platform_of(node: RackNode, tree: Tree | None = None) -> Platform:
    """Processor, host bridge and ACS bits as the running machine has them: they can be changed.

    ``tree``: the agent's ``pci.tree``, if it is at hand.
    """
    found = node.agent.call("system.info")
    devices: Tree = node.agent.call("pci.tree")["devices"] if tree is None else tree
    bridge = min(devices, key=lambda device: str(device["bdf"]))
    return Platform(
        Cpu(found["cpu_vendor"], found["cpu_family"]),
        (bridge["vendor"], bridge["device"]),
        frozenset(d["bdf"] for d in devices if d["acs"] and d["acs"]["redirect"]),
    )


@contextmanager
def providing(node: RackNode, provider: Function) -> Iterator[None]:
    """Video memory is a provider only while we make it one; a disk's memory is one by itself.

    :raises AgentError: the kernel cannot make it one, or somebody else uses the function.
    """
    if provider.role is not Role.VRAM:
        yield
        return
    params: dict[str, Any] = {"device": provider.bdf, "bar": VRAM_BAR}
    node.agent.call("p2p.provide", **params, size_bytes=PROVIDED_BYTES)
    try:
        yield
    finally:
        if node.alive:
            node.agent.call("p2p.release", device=provider.bdf)


def decisions(
    node: RackNode, provider: Function, clients: Sequence[Function]
) -> dict[str, Decision]:
    """The kernel's own, by the clients' addresses.

    The distance is asked for first: the kernel keeps what it decided about a pair until then.

    :raises AgentError: a client cannot be asked about.
    """
    call, addresses = node.agent.call, [client.bdf for client in clients]
    distances = call("p2p.distance", provider=provider.bdf, clients=addresses)
    types = call("p2p.map_types", provider=provider.bdf, clients=addresses)
    return {bdf: Decision(_KINDS[types[bdf]["type"]], distances[bdf]) for bdf in addresses}
