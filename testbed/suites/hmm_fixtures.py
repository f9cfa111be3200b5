# SPDX-License-Identifier: Apache-2.0
"""Fixture ``arrange_private``: a video memory and a device that looks at what is in it.

A test module that wants it says ``pytest_plugins = ["testbed.suites.hmm_fixtures"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from testbed.errors import CapabilityMissing
from testbed.harness.racks import LiveRack
from testbed.instruments.dmabuf import BufferPair, buffer_pairs
from testbed.instruments.faults import watch_machine
from testbed.instruments.interface import RackNode
from testbed.instruments.mutations import Mutation
from testbed.instruments.private_memory import MODULE, Workplace
from testbed.instruments.reasons import why_not_shown
from testbed.suites.dmabuf_fixtures import ROUTES, THROUGH_HOST_BRIDGE, bus_address
from testbed.suites.kernel_fixtures import kernel_module, trusted_nodes
from testbed.suites.p2p_kernel import ROUTER
from testbed.topology.oracle import Route
from testbed.topology.placement import place
from testbed.topology.plan import MODEL_KINDS, Function, RackPlan, Role

# ``arrange_private(path=True)``: see the fixture.
ArrangePrivate = Callable[..., Workplace]


@pytest.fixture
def arrange_private(rack: LiveRack, mutation: Mutation) -> Iterator[ArrangePrivate]:
    """``arrange_private(...)``: a pair and the module, or a SKIP that says what the rack lacks.

    ``path``   the kernel knows a peer-to-peer way between them; False: it does not; None: either.
    ``own``    only a memory whose own engine is driven too.
    """
    with ExitStack() as stack:

        def make(*, path: bool | None = None, own: bool = False) -> Workplace:
            plan = place(rack.topology)
            pairs = buffer_pairs(plan)
            if own:
                pairs = [pair for pair in pairs if _own_engine(plan, pair)]
            if not pairs:
                lacking = " (the GPU model in both)" if own else ""
                raise CapabilityMissing(f"this rack lacks two GPUs with engines{lacking}")
            rack.get()
            rack.drop_all()  # what VFIO has, no driver can have
            node, pair, by_iova = _choose(rack, pairs, path)
            iommu = rack.topology.nodes[pair.node].iommu
            if why := why_not_shown(iommu):
                raise CapabilityMissing(why)
            engine = _own_engine(plan, pair)
            stack.enter_context(kernel_module(node, MODULE))
            if pair.route is Route.SWITCH and pair.importer.kind not in MODEL_KINDS:
                stack.enter_context(kernel_module(node, ROUTER))
            workplace = Workplace(
                node,
                pair,
                engine,
                iommu,
                by_iova,
                bus_address(node, pair.exporter),
                watch_machine(node),
                mutation,
            )
            stack.callback(_release, workplace)
            for function in (pair.exporter, pair.importer, *([engine] if own and engine else [])):
                workplace.call("bind", device=function.bdf)
            return workplace

        yield make


def _release(workplace: Workplace) -> None:
    if workplace.node.alive:
        workplace.call("release")


def _own_engine(plan: RackPlan, pair: BufferPair) -> Function | None:
    """What reaches the pair's video memory without a bus."""
    for function in plan.nodes[pair.node].by_role(Role.ENGINE):
        if function.device == pair.exporter.device and function.kind in MODEL_KINDS:
            return function
    return None


def _choose(
    rack: LiveRack, pairs: list[BufferPair], path: bool | None
) -> tuple[RackNode, BufferPair, bool]:
    """The first pair, by route, with or without a way that the kernel knows.

    And whether that leads through the host bridge, where the IOMMU translates.
    """
    trusted = trusted_nodes(rack)
    for route in ROUTES:
        for pair in pairs:
            if pair.route is not route:
                continue
            through_host = route in THROUGH_HOST_BRIDGE and trusted(pair.node)
            if path is None or path is (through_host or route is Route.SWITCH):
                return rack.nodes[pair.node], pair, through_host
    if path:
        raise CapabilityMissing(
            "two GPUs below a plain switch, or an AMD processor of family 0x17 or later"
            " (machine: {cpu: EPYC})"
        )
    raise CapabilityMissing(
        "two GPUs without a plain switch in common, and another processor than AMD's"
        " (machine: {cpu: max})"
    )
