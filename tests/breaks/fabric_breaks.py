# SPDX-License-Identifier: Apache-2.0
"""Each deliberate break of the fabric's rules, and the tests that must FAIL of it.

Not collected by itself: ``test_suite_fabric.py`` runs it as a suite, so that all breaks share one
rack. A test here passes if the suite's test does not while the rule is broken, and does when it is
mended. ``testbed run p2p-fabric --break NAME`` does the same to a whole run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from testbed.harness.racks import LiveRack
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.suites import p2p_fabric as modes
from testbed.suites import p2p_fabric_bells as bells
from testbed.suites import p2p_fabric_forwarded as forwarded
from testbed.suites import p2p_fabric_loss as loss
from testbed.suites.fabric_ways import Way
from testbed.suites.p2p_fabric_ground import the_fabric
from tests.breaks.guards import parameters

pytest_plugins = ["testbed.suites.p2p_fabric_ground"]

Test = Callable[..., None]

HOLE, SECRET = (
    modes.test_an_address_that_is_not_linked_faults,
    modes.test_what_is_not_exported_is_out_of_reach,
)
LINKS = modes.test_link_sync_unlink_and_free

# What these break of a test that needs two nodes and no restart.
GUARDS: list[tuple[Mutation, Test, dict[str, Any]]] = [
    (Mutation.FABRIC_MAP_PHYSICAL, modes.test_a_physical_address_needs_no_mapping, {}),
    (Mutation.FABRIC_EXPORT_ALL, HOLE, {}),
    (Mutation.FABRIC_EXPORT_ALL, SECRET, {}),
    (Mutation.FABRIC_EXPORT_ALL, LINKS, {}),
    (Mutation.FABRIC_SKIP_UNLINK, HOLE, {}),
    (Mutation.FABRIC_SKIP_UNLINK, SECRET, {}),
    (Mutation.FABRIC_SKIP_UNLINK, LINKS, {}),
    (Mutation.FABRIC_EARLY_SYNC, LINKS, {}),
    *(
        (
            Mutation.FABRIC_ANY_CONTEXT,
            modes.test_contexts_in_which_addresses_are_not_allocated,
            {"context": context},
        )
        for context in modes.FABRIC_RULES
    ),
    (Mutation.FABRIC_ANY_ADDRESS, modes.test_addresses_of_the_wrong_type, {}),
    *(
        (Mutation.FABRIC_STAY_UP, test, {"mutation": Mutation.FABRIC_STAY_UP})
        for test in (loss.test_a_link_that_goes_down, loss.test_a_link_goes_down_under_load)
    ),
]

# What tests below watch, each in a way of its own; and by hand, with windows or restarts.
FAILING: dict[Mutation, set[str]] = {
    Mutation.FABRIC_ALWAYS_VIRTUAL: {"FAB-04"},
    Mutation.FABRIC_BLIND_ANSWER: {"NEG-08"},
    Mutation.FABRIC_WRONG_BELL: {"FAB-09"},
}
BY_HAND = {Mutation.FABRIC_KEEP_WINDOW: {"FAB-03"}, Mutation.FABRIC_KEEP_MAPPED: {"FAB-10"}}


@pytest.mark.parametrize(("mutation_", "test", "more"), parameters(GUARDS))
def test_a_broken_fabric_fails(
    rack: LiveRack, observe: Observer, mutation_: Mutation, test: Test, more: dict[str, Any]
) -> None:
    with pytest.raises(Refuted) as broken:
        _run(rack, mutation_, test, Observer(), more)
    mended = {name: Mutation.NONE if name == "mutation" else more[name] for name in more}
    _run(rack, Mutation.NONE, test, observe, mended)
    observe.conclude(f"broken: {broken.value}; mended, it passes")


def _run(
    rack: LiveRack, mutation: Mutation, test: Test, observe: Observer, more: dict[str, Any]
) -> None:
    way: Way = the_fabric(rack).way(same_os=False)
    way.mutation = mutation
    try:
        test(way, observe=observe, **more)
    finally:
        way.close()


@pytest.mark.requirement("FAB-04")
def test_a_default_that_is_always_virtual_fails(rack: LiveRack, observe: Observer) -> None:
    """It needs a pair within one system, too."""
    fabric = the_fabric(rack)
    within, between = fabric.way(same_os=True), fabric.way(same_os=False)
    within.mutation = between.mutation = Mutation.FABRIC_ALWAYS_VIRTUAL
    try:
        with pytest.raises(Refuted, match="the default is virtual, not physical"):
            modes.test_within_one_system_physical_is_the_default(within, between, Observer())
    finally:
        within.close()
        between.close()
    observe.conclude("always virtual: FAB-04 FAILs")


@pytest.mark.requirement("NEG-08")
def test_a_host_that_agrees_blindly_fails(rack: LiveRack, observe: Observer) -> None:
    way = the_fabric(rack).way(same_os=False)
    way.mutation = Mutation.FABRIC_BLIND_ANSWER
    try:
        with pytest.raises(Refuted, match="no link"):
            forwarded.test_between_nodes_the_host_s_word_is_needed(rack, way, Observer())
    finally:
        way.close()
    observe.conclude("every question answered with yes: NEG-08 FAILs")


@pytest.mark.requirement("FAB-09")
def test_a_bell_that_rings_wrongly_fails(rack: LiveRack, observe: Observer) -> None:
    with ExitStack() as stack:
        wrong = bells.open_bells(rack, Mutation.FABRIC_WRONG_BELL, stack)
        with pytest.raises(Refuted, match="interrupts, not"):
            bells.test_nodes_interrupt_one_another(wrong, Observer())
    observe.conclude("another vector is rung: FAB-09 FAILs")
