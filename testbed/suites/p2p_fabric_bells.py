# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-fabric``, part four: nodes that interrupt one another (FAB-09)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product

import pytest

from testbed.errors import CapabilityMissing
from testbed.harness.racks import LiveRack
from testbed.instruments.bells import VECTORS, Bell, Rings
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.machine.bells import bells_of
from testbed.results.evidence import Counter
from testbed.topology.placement import place
from testbed.topology.plan import RackPlan

RING_TIMEOUT_S = 10.0
QUIET_S = 0.3
NOBODY = 99


def several_bells(plan: RackPlan) -> bool:
    """Whether nodes can interrupt one another."""
    return len({node for node, _ in bells_of(plan)}) > 1


pytestmark = pytest.mark.boots(when=several_bells)


def open_bells(rack: LiveRack, mutation: Mutation, stack: ExitStack) -> list[Bell]:
    """One bell of each node. :raises CapabilityMissing: only one node has any."""
    first: dict[str, Bell] = {}
    plan = place(rack.topology)
    found = bells_of(plan)
    if not several_bells(plan):
        raise CapabilityMissing("a `bell` on each of two nodes")
    for number, (node, function) in enumerate(found):
        if node not in first:
            first[node] = Bell(rack.nodes[node], function, number, mutation)
            stack.callback(first[node].close)
    return list(first.values())


@pytest.fixture
def bells(rack: LiveRack, mutation: Mutation) -> Iterator[list[Bell]]:
    """A bell of each node, open, with its interrupts counted."""
    with ExitStack() as stack:
        yield open_bells(rack, mutation, stack)


def ring_all(bells: list[Bell], observe: Observer) -> None:
    """Each rings each other one: that one is interrupted by that vector, once, and nobody else.

    Whoever else was interrupted has counted it, and is asked once for each that was rung.
    """
    for bell in bells:
        bell.rings()
        if bell.position() != bell.number:
            raise Refuted(f"{bell.name} says that it is {bell.position()}, not {bell.number}")
    for rung in bells:
        others = [bell for bell in bells if bell is not rung]
        for by, vector in product(others, VECTORS):
            by.ring(rung.number, vector)
            _judge(rung, rung.rings(vector, RING_TIMEOUT_S), vector, f"rung by {by.name}")
            observe.add(Counter(f"{by.name} rings {rung.name}[{vector}]", 1, "interrupts"))
        for other in others:
            _judge(other, other.rings(), None, f"while others ring {rung.name}")


def _judge(bell: Bell, rings: Rings, vector: int | None, when: str) -> None:
    right = tuple(int(each == vector) for each in VECTORS)
    for who, seen in (("who waits", rings.waited_for), ("its kernel", rings.by_kernel)):
        if seen != right:
            raise Refuted(f"{bell.name}, {when}: {who} counts {seen} interrupts, not {right}")


@pytest.mark.requirement("FAB-09")
def test_nodes_interrupt_one_another(bells: list[Bell], observe: Observer) -> None:
    """Each way, by each vector; a number or vector that nobody has interrupts nobody."""
    ring_all(bells, observe)
    first = bells[0]
    for number, vector in ((NOBODY, 0), (bells[1].number, len(VECTORS)), (bells[1].number, 255)):
        first.ring(number, vector)
    _judge(bells[1], bells[1].rings(0, QUIET_S), None, "after rings for nobody")
    first.ring(bells[1].number, 0)
    _judge(bells[1], bells[1].rings(0, RING_TIMEOUT_S), 0, "rung after all that")
    names = ", ".join(bell.name for bell in bells)
    observe.conclude(f"{names}: each interrupts each other by each vector, and nobody else")
