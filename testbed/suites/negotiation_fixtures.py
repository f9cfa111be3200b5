# SPDX-License-Identifier: Apache-2.0
"""Fixture ``board`` of the suite ``p2p-negotiation``: a room of the protocol core, empty."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.errors import CapabilityMissing
from testbed.harness.racks import LiveRack
from testbed.instruments.interface import Rack
from testbed.instruments.mutations import Mutation
from testbed.instruments.negotiation_board import NegotiationBoard, do, takes_part
from testbed.instruments.negotiation_rules import DEFAULT_POLICY
from testbed.instruments.observer import Refuted
from testbed.topology.placement import place
from testbed.topology.plan import RackPlan


def a_node(plan: RackPlan) -> str:
    """The first node on which two GPU models have an address space each, or "" if none is so."""
    for name in plan.nodes:
        iommu = plan.topology.nodes[name].iommu
        translates = iommu.kind != "none" and iommu.mode not in ("off", "passthrough")
        if translates and len(takes_part(plan, name)[0]) > 1:
            return name
    return ""


def has_node(plan: RackPlan) -> bool:
    """Whether any test of this suite will get as far as its rack."""
    return bool(a_node(plan))


@pytest.fixture
def board(
    rack: LiveRack, mutation: Mutation, policy: str, request: pytest.FixtureRequest
) -> Iterator[NegotiationBoard]:
    """The board that all tests share, cleaned before it is given back.

    What a test leaves in use, with everything ended, is a leak and a FAIL.
    """

    node = a_node(place(rack.topology))
    if not node:
        raise CapabilityMissing(
            "a node with two GPU models behind an IOMMU that translates, in a group each"
        )

    def make(booted: Rack) -> NegotiationBoard:
        return NegotiationBoard(booted, node, mutation, policy or DEFAULT_POLICY)

    key = ("negotiation", node)
    made = rack.once(key, make, NegotiationBoard.close, holds="negotiation", ahead=True)
    made.run(do("chapter", title=request.node.name.removeprefix("test_")))
    yield made
    if rack.is_running:
        if made.broken:
            made.mend()
            return
        left = made.clean()
        if mutation is Mutation.NONE and (left["problems"] or left["left"] != made.unused):
            raise Refuted(f"left in use: {left}; {made.unused} at the start")


@pytest.fixture(autouse=True, scope="session")
def give_back(rack: LiveRack) -> Iterator[None]:
    """At the end the devices go back to their drivers, in a rack that lives on."""
    yield
    if rack.is_running and not rack.ours:
        rack.drop_all()
