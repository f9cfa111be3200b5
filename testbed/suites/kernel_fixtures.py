# SPDX-License-Identifier: Apache-2.0
"""What suites about the kernel's own peer-to-peer DMA need: ``arrange``, and modules of ours.

A test module that wants them says ``pytest_plugins = ["testbed.suites.kernel_fixtures"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import pytest

from testbed.errors import CapabilityMissing
from testbed.guest import modules, switch_router
from testbed.harness.racks import LiveRack
from testbed.instruments.interface import RackNode
from testbed.instruments.mutations import Mutation
from testbed.instruments.reasons import why_not_shown
from testbed.instruments.storage import DiskPair, Disks, Provided, disk_pairs
from testbed.rack_node import RackNode as RealNode
from testbed.topology.model import Node, with_overrides
from testbed.topology.oracle import FIRST_ZEN_FAMILY, Route
from testbed.topology.placement import place
from testbed.topology.plan import RackPlan

Variant = Callable[[str], LiveRack]

_LACKS = {
    Route.SWITCH: "two disks below a switch without ACS redirect, one with controller memory",
    Route.REDIRECTED: "two disks below a switch with ACS redirect, one with controller memory",
    Route.ROOT: "two disks without a switch in common, one with controller memory",
}


@dataclass(frozen=True)
class Needs:
    """What a requirement is about.

    ``routes``    which pairs show it; the first that the rack has, its IOMMU as in the variant.
    ``amd``       True: only behind the host bridge of an AMD processor that Linux trusts; False:
        only behind one that it does not trust; None: either.
    ``variant``   the rack's variant to use, "" for the rack itself, whose IOMMU must translate.
    """

    routes: tuple[Route, ...]
    amd: bool | None = None
    variant: str = ""


@dataclass(frozen=True)
class Machine:
    """A pair of disks on a running node, with the provider's memory allocated."""

    node: RackNode = field(repr=False)
    pair: DiskPair
    disks: Disks = field(repr=False)
    provided: Provided = field(repr=False)
    node_spec: Node = field(repr=False)
    translates: bool

    def close(self) -> None:
        """Give the memory back."""
        self.provided.free()
        self.disks.close()


Arrange = Callable[[Needs], Machine]


def with_disks(*routes: Route, iommu_mode: str = "") -> Callable[[RackPlan], bool]:
    """Whether a rack has a pair of disks with one of these routes, with its IOMMU in this mode."""

    def fits(plan: RackPlan) -> bool:
        if iommu_mode:
            plan = place(with_overrides(plan.topology, iommu_mode=iommu_mode))
        return any(pair.route in routes for pair in disk_pairs(plan))

    return fits


@pytest.fixture
def arrange(
    disks: None,  # noqa: ARG001  which it says that it looks at
    rack: LiveRack,
    variant: Variant,
    mutation: Mutation,
) -> Iterator[Arrange]:
    """``arrange(Needs(...))``: the machine that a requirement needs, or a SKIP that says what the
    rack lacks."""
    made: list[tuple[LiveRack, Machine]] = []

    def make(needs: Needs) -> Machine:
        live = variant(needs.variant) if needs.variant else rack
        pair = _pair(live, needs, mutation)
        if not needs.variant and (why := why_not_shown(rack.topology.nodes[pair.node].iommu)):
            raise CapabilityMissing(why)
        node = live.nodes[pair.node]
        _check_processor(node, needs.amd)
        spec = live.topology.nodes[pair.node]
        translates = not why_not_shown(spec.iommu)
        provided = Provided.of(node, pair.provider)
        machine = Machine(node, pair, Disks(node, mutation), provided, spec, translates)
        made.append((live, machine))
        return machine

    yield make
    for live, machine in made:
        if live.is_running:
            machine.close()


def is_trusted_amd(node: RackNode) -> bool:
    """Linux trusts the host bridge of its processor to route between root ports."""
    found = node.agent.call("system.info")
    return bool(found["cpu_vendor"] == "AuthenticAMD" and found["cpu_family"] >= FIRST_ZEN_FAMILY)


def trusted_nodes(rack: LiveRack) -> Callable[[str], bool]:
    """:func:`is_trusted_amd` of a node by its name; each is asked once at most."""
    return cache(lambda name: is_trusted_amd(rack.nodes[name]))


@contextmanager
def kernel_module(node: RackNode, name: str) -> Iterator[None]:
    """Inside the block the guest's kernel has a module of ours.

    CapabilityMissing: it cannot have it; names the option or symbol.
    """
    real = _real(node, name)
    loaded = modules.ensure(real, name)
    yield
    if loaded and node.alive:
        modules.unload(real, name)


@contextmanager
def without_kernel_module(node: RackNode, name: str) -> Iterator[None]:
    """Inside the block the guest's kernel has it not, whoever loaded it before."""
    real = _real(node, name)
    was_loaded = modules.is_loaded(real, name)
    if was_loaded:
        modules.unload(real, name)
    yield
    if was_loaded and node.alive:
        modules.load(real, name, keep=True)


def _real(node: RackNode, name: str) -> RealNode:
    if not isinstance(node, RealNode):
        raise CapabilityMissing(f"module {name}: this rack has no kernel")
    return node


@contextmanager
def routing(node: RackNode, mutation: Mutation) -> Iterator[None]:
    """Inside the block plain switches route what disks send, unless that is broken on purpose."""
    change = without_kernel_module if mutation is Mutation.NO_ROUTER else kernel_module
    with change(node, switch_router.MODULE):
        yield


def _pair(rack: LiveRack, needs: Needs, mutation: Mutation) -> DiskPair:
    pairs = list(disk_pairs(place(rack.topology)))
    routes = (Route.SWITCH,) if mutation is Mutation.NEAR_PAIR else needs.routes
    for route in routes:
        for pair in pairs:
            if pair.route is route:
                return pair
    raise CapabilityMissing("this rack lacks " + ", or ".join(_LACKS[r] for r in needs.routes))


def _check_processor(node: RackNode, amd: bool | None) -> None:
    if amd is not None and amd is not is_trusted_amd(node):
        what = "an AMD processor of family 0x17 or later" if amd else "another processor than AMD's"
        raise CapabilityMissing(f"{what} (machine: {{cpu: {'EPYC' if amd else 'max'}}})")
