# SPDX-License-Identifier: Apache-2.0
"""Fixture ``exchange``: an exporter and an importer of dma-bufs, on the machine that a test needs.

A test module that wants it says ``pytest_plugins = ["testbed.suites.dmabuf_fixtures"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from testbed.errors import CapabilityMissing
from testbed.harness.racks import LiveRack
from testbed.instruments.dmabuf import EXPORTER, IMPORTER, BufferPair, Exchange, buffer_pairs
from testbed.instruments.faults import watch_machine
from testbed.instruments.interface import RackNode
from testbed.instruments.memory import VRAM_BAR
from testbed.instruments.mutations import Mutation
from testbed.instruments.reasons import why_not_shown
from testbed.suites.kernel_fixtures import kernel_module, trusted_nodes
from testbed.suites.p2p_kernel import ROUTER
from testbed.topology.machine import Iommu
from testbed.topology.oracle import Route
from testbed.topology.placement import place
from testbed.topology.plan import Function, RackPlan

IOMMU_OFF = "iommu-off"  # a variant of the rack
ROUTES = (Route.ROOT, Route.REDIRECTED, Route.SWITCH)
THROUGH_HOST_BRIDGE = (Route.ROOT, Route.REDIRECTED)

# ``arrange_buffers(...)``: see the fixture.
ArrangeBuffers = Callable[..., Exchange]


def with_buffers(*routes: Route) -> Callable[[RackPlan], bool]:
    """Whether a rack has a pair of exporter and importer with one of these routes; of any if none
    is named."""
    return lambda plan: any(pair.route in (routes or ROUTES) for pair in buffer_pairs(plan))


has_buffers = with_buffers()


@pytest.fixture
def arrange_buffers(
    rack: LiveRack, variant: Callable[[str], LiveRack], mutation: Mutation
) -> Iterator[ArrangeBuffers]:
    """``arrange_buffers(...)``: a pair and its modules, or a SKIP that says what the rack lacks.

    ``routes``    which pairs show it, in this order.
    ``allowed``   False: also a pair that the kernel allows no peer-to-peer DMA.
    ``name``      the rack's variant to use, "" for the rack itself, whose IOMMU must translate; if
        any route will do and the kernel allows none there, the variant without an IOMMU.
    ``vfio``      the exporter is left to VFIO.
    ``here``      no variant will do, unless it is named.
    ``broken``    what is broken on purpose, instead of what the run breaks.
    """
    # Asked of the rack itself: a variant has the same processor, and need not boot to say so.
    trusted = trusted_nodes(rack)
    with ExitStack() as stack:

        def make(
            routes: tuple[Route, ...] = ROUTES,
            *,
            allowed: bool = True,
            name: str = "",
            vfio: bool = False,
            here: bool = False,
            broken: Mutation = mutation,
        ) -> Exchange:
            live = variant(name) if name else rack
            try:
                node, pair, through_host = _choose(live, routes, trusted, allowed=allowed)
            except CapabilityMissing as missing:
                if name or vfio or here or routes != ROUTES:
                    raise
                # Where Linux refuses what a switch redirects, it allows it without an IOMMU.
                try:
                    name, live = IOMMU_OFF, variant(IOMMU_OFF)
                    node, pair, through_host = _choose(live, routes, trusted, allowed=allowed)
                except CapabilityMissing:
                    raise missing from None
            iommu = live.topology.nodes[pair.node].iommu
            if not name and (why := why_not_shown(iommu)):
                raise CapabilityMissing(why)
            return stack.enter_context(
                opened(node, pair, iommu, through_host=through_host, vfio=vfio, mutation=broken)
            )

        yield make


@contextmanager
def opened(
    node: RackNode,
    pair: BufferPair,
    iommu: Iommu,
    *,
    through_host: bool,
    vfio: bool = False,
    mutation: Mutation = Mutation.NONE,
) -> Iterator[Exchange]:
    """Inside the block the two modules drive the pair's functions; what was made is given back.

    :param through_host: the kernel sends the pair's traffic through the host bridge.
    CapabilityMissing: the kernel cannot have a module; names the option or symbol.
    """
    with ExitStack() as stack:
        for module in (EXPORTER, IMPORTER):
            stack.enter_context(kernel_module(node, module))
        if pair.route is Route.SWITCH and pair.importer.kind == "edu":
            stack.enter_context(kernel_module(node, ROUTER))
        exchange = Exchange(
            node,
            pair,
            iommu,
            through_host and not why_not_shown(iommu),
            bus_address(node, pair.exporter),
            watch_machine(node),
            vfio,
            mutation,
        )
        stack.callback(_release, exchange)
        exchange.call("bind", device=pair.importer.bdf, module=IMPORTER)
        if not vfio:
            exchange.call("bind", device=pair.exporter.bdf, module=EXPORTER)
        yield exchange


def _choose(
    live: LiveRack,
    routes: tuple[Route, ...],
    trusted: Callable[[str], bool],
    *,
    allowed: bool,
) -> tuple[RackNode, BufferPair, bool]:
    """The first pair, by route, that the kernel lets do peer-to-peer DMA, unless any will do.

    And whether the kernel sends it through the host bridge, which it does if it trusts it.
    """
    pairs = buffer_pairs(place(live.topology))
    if not pairs:
        raise CapabilityMissing(
            "this rack lacks two GPUs, one of which has an engine (edu or the GPU model)"
        )
    for route in routes:
        for pair in pairs:
            if pair.route is not route:
                continue
            through_host = route in THROUGH_HOST_BRIDGE and trusted(pair.node)
            if through_host or not allowed or route is Route.SWITCH:
                live.get()
                live.drop_all()  # what VFIO has, no driver can have
                return live.nodes[pair.node], pair, through_host
    if not any(pair.route in routes for pair in pairs):
        with_or_without = "with" if Route.SWITCH in routes else "without"
        raise CapabilityMissing(
            f"this rack lacks two GPUs {with_or_without} a plain switch in common"
        )
    raise CapabilityMissing("an AMD processor of family 0x17 or later (machine: {cpu: EPYC})")


def _release(exchange: Exchange) -> None:
    if exchange.node.alive:
        exchange.call("release")


def bus_address(node: RackNode, exporter: Function) -> int:
    """Where the BAR of a video memory is. CapabilityMissing: it has no address."""
    for device in node.agent.call("pci.tree", only=[exporter.bdf])["devices"]:
        for bar in device["bars"]:
            if bar["index"] == VRAM_BAR:
                return int(bar["address"])
    raise CapabilityMissing(f"{exporter.name}: its BAR {VRAM_BAR} has no address")
