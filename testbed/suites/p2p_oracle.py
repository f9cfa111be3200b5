# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-kernel``, second part: the prediction against the kernel's own decision, every pair.

:mod:`testbed.topology.oracle` says from the topology alone how a device may reach another's memory.
The guest's kernel is asked through a module of ours (``guest_agent/kmod/p2p_probe``), which calls
``pci_p2pdma_distance_many()`` and ``dma_map_sgtable()`` and repeats no rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from testbed.errors import CapabilityMissing
from testbed.harness.racks import LiveRack
from testbed.instruments.interface import RackNode
from testbed.instruments.kernel_p2p import decisions, platform_of, providing
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.results.evidence import Counter, Note
from testbed.suites.kernel_fixtures import is_trusted_amd, kernel_module
from testbed.suites.p2p_kernel import PROBE
from testbed.topology.machine import Iommu
from testbed.topology.matrix import Decision, decide
from testbed.topology.oracle import FIRST_ZEN_FAMILY, Cpu
from testbed.topology.plan import Function, Role

pytest_plugins = ["testbed.suites.kernel_fixtures", "testbed.suites.p2p_fixtures"]
pytestmark = pytest.mark.usefixtures("disks")

CLIENT_ROLES = (Role.VRAM, Role.ENGINE, Role.DOORBELL, Role.NVME)
_SHOWN = 5


@pytest.mark.requirement("TOPO-12")
def test_the_prediction_is_what_the_kernel_does(
    rack: LiveRack, node_name: str, mutation: Mutation, observe: Observer
) -> None:
    """Map type and distance of every pair, predicted from the topology and asked of the kernel."""
    node = rack.nodes[node_name]
    if not node.plan.by_role(Role.VRAM, Role.NVME):
        raise CapabilityMissing("this rack lacks a device with memory for its peers")
    rack.drop_all()  # a function that VFIO has cannot be asked about
    facts = _Facts(node, rack.topology.nodes[node_name].iommu, mutation)
    clients = list(node.plan.by_role(*CLIENT_ROLES))
    wrong: list[str] = []
    pairs = 0
    with kernel_module(node, PROBE):
        for provider in _providers(node):
            with providing(node, provider):
                others = [client for client in clients if client is not provider]
                for client, said in facts.ask(provider, others):
                    pairs += 1
                    predicted = facts.predict(provider, client)
                    if said != predicted:
                        name = f"{client.name} → {provider.name}"
                        wrong.append(f"{name}: predicted {predicted}, the kernel says {said}")
    observe.add(Counter("pairs compared", pairs), *map(Note, wrong[:_SHOWN]))
    if wrong:
        raise Refuted(f"{len(wrong)} of {pairs} pairs: {wrong[0]}")
    if not pairs:
        raise CapabilityMissing("this rack lacks two devices")
    observe.conclude(f"all {pairs} pairs are as predicted: map type and distance")


@pytest.mark.requirement("TOPO-11")
def test_the_nearest_provider_is_chosen(
    rack: LiveRack, node_name: str, mutation: Mutation, observe: Observer
) -> None:
    """Of several providers the kernel takes the one that is nearest to the client."""
    node = rack.nodes[node_name]
    rack.drop_all()
    facts = _Facts(node, rack.topology.nodes[node_name].iommu)
    hides = mutation is Mutation.HIDE_NEAREST
    shown: list[str] = []
    with kernel_module(node, PROBE), ExitStack() as stack:
        providers = list(_providers(node))
        for provider in providers:
            stack.enter_context(providing(node, provider))
            is_offered = not (hides and provider is providers[0])
            node.agent.call("p2p.publish", provider=provider.bdf, publish=is_offered)
        names = {provider.bdf: provider.name for provider in providers}
        for client in node.plan.by_role(*CLIENT_ROLES):
            distances = {p.bdf: facts.predict(p, client).distance for p in providers}
            near = sorted({distance for distance in distances.values() if distance is not None})
            nearest = {bdf for bdf, distance in distances.items() if distance in near[:1]}
            chosen = node.agent.call("p2p.find", clients=[client.bdf])["provider"]
            if (chosen in nearest) != bool(nearest):
                better = " or ".join(names[bdf] for bdf in nearest) or "none"
                raise Refuted(f"{client.name} got {names.get(chosen, chosen)}, nearest is {better}")
            if len(near) > 1:
                shown.append(f"{client.name}: {names[chosen]} at {near[0]}, of {near}")
    if not shown:
        raise CapabilityMissing("this rack lacks a client with providers near and far")
    observe.add(*map(Note, shown[:_SHOWN]))
    observe.conclude(f"the nearest was chosen for {len(shown)} clients: {shown[0]}")


class _Facts:
    """The prediction, by what the running machine says of itself, and the kernel's own answers."""

    def __init__(self, node: RackNode, iommu: Iommu, mutation: Mutation = Mutation.NONE) -> None:
        node.agent.call("nvme.namespaces")  # disks provide once their driver has looked at them
        self._node = node
        self._iommu = iommu
        self._platform = platform_of(node)
        if mutation is Mutation.WRONG_CPU:
            trusted, other = Cpu("AuthenticAMD", FIRST_ZEN_FAMILY), Cpu("GenuineIntel", 6)
            wrong = other if is_trusted_amd(node) else trusted
            self._platform = replace(self._platform, cpu=wrong)

    def predict(self, provider: Function, client: Function) -> Decision:
        """Map type and distance."""
        return decide(self._node.plan, provider, client, self._platform, self._iommu)[0]

    def ask(
        self, provider: Function, clients: list[Function]
    ) -> Iterator[tuple[Function, Decision]]:
        """The same, from the kernel."""
        said = decisions(self._node, provider, clients)
        yield from ((client, said[client.bdf]) for client in clients)


def _providers(node: RackNode) -> Iterator[Function]:
    for function in node.plan.by_role(Role.VRAM, Role.NVME):
        if function.role is Role.VRAM or function.options["cmb_bytes"]:
            yield function
