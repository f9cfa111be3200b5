# SPDX-License-Identifier: Apache-2.0
"""Device-private pages of another device: owners, decisions, and what the devices then see."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.p2p.addresses import DmaAddress, LinkAddress
from guest_agent.p2p.errors import FaultError, GoneError, P2PError
from guest_agent.p2p.hmm import Mirror, OwnerGroups, Page
from guest_agent.p2p.interconnect import Kind, Offer
from tests.unit.p2p.machines import DEVICE, SYSTEM, Machine, gpu_offers, offer, tree

PAIRS = {frozenset(pair) for pair in (("A", "B"), ("B", "C"))}


def linked(one: str, other: str) -> bool:
    return frozenset((one, other)) in PAIRS


def grouped(order: str) -> tuple[tuple[str, ...], ...]:
    owners = OwnerGroups(linked)
    for device in order:
        owners.join(device)
    return owners.groups()


def test_owner_groups_depend_on_the_order_of_joining() -> None:
    assert grouped("ABC") == (("A", "B"), ("C",))
    assert grouped("CBA") == (("C", "B"), ("A",))
    assert grouped("ACB") == (("A", "B"), ("C",))
    assert grouped("BCA") == (("B", "C"), ("A",))


@given(st.sets(st.frozensets(st.integers(0, 5), min_size=2, max_size=2)), st.permutations(range(6)))
def test_all_members_of_a_group_are_linked_to_one_another(
    pairs: set[frozenset[int]], order: list[int]
) -> None:
    owners = OwnerGroups(lambda a, b: frozenset((int(a), int(b))) in pairs)
    for device in order:
        owners.join(str(device))
    for group in owners.groups():
        for a, b in itertools.combinations(group, 2):
            assert frozenset((int(a), int(b))) in pairs


def test_joining_and_leaving() -> None:
    owners = OwnerGroups(linked)
    first = owners.join("A")
    with pytest.raises(P2PError, match="before"):
        owners.join("A")
    owners.leave("A")
    with pytest.raises(GoneError):
        owners.leave("A")
    assert owners.join("B") != first  # whose pages are marked with the old owner


def mirror(machine: Machine, join: str = "gpu0 gpu1 gpu2") -> Mirror:
    offers: dict[str, tuple[Offer, ...]] = {
        "gpu0": gpu_offers("gpu0", [(Kind.XGMI, "x01")]),
        "gpu1": gpu_offers("gpu1", [(Kind.XGMI, "x01")]),
        "gpu2": gpu_offers("gpu2"),
        "disk": gpu_offers("disk"),
        "deaf": (offer(Kind.NVLINK, "deaf", "n"),),
    }
    owners = OwnerGroups(lambda a, b: {a, b} == {"gpu0", "gpu1"})
    for device in join.split():
        owners.join(device)
    backing = machine.backend.allocate("gpu0", DEVICE, 4096)
    page = Page(backing, owners.owner_of("gpu0"))
    return Mirror(machine.core, "page0", page, dict(offers), owners)


def fill(machine: Machine, shared: Mirror, data: bytes) -> None:
    machine.backend._bytes[shared.page.backing.number][: len(data)] = data


def actions(machine: Machine) -> list[str]:
    events = machine.core.events.events()
    return [event.details["action"] for event in events if event.kind == "fault"]


def test_linked_devices_use_the_page_in_place_over_the_link() -> None:
    machine = Machine()
    shared = mirror(machine)
    fill(machine, shared, b"1a")
    address = shared.fault("gpu1")
    assert isinstance(address, LinkAddress)
    assert machine.backend.read(address, 0, 2) == b"1a"
    assert shared.page.backing.placement is DEVICE
    assert actions(machine) == ["1a: in place over the link"]
    assert shared.fault("gpu0") is None  # its own


def test_others_use_it_in_place_over_pcie_each_at_an_address_of_its_own() -> None:
    machine = Machine()
    shared = mirror(machine)
    fill(machine, shared, b"1b")
    near, far = shared.fault("gpu2"), shared.fault("disk")
    assert isinstance(near, DmaAddress)
    assert isinstance(far, DmaAddress)
    assert near.value != far.value
    for address in (near, far):
        assert machine.backend.read(address, 0, 2) == b"1b"
    with pytest.raises(FaultError):
        machine.backend.read(DmaAddress(near.value, "disk"), 0, 2)
    assert shared.fault("gpu2") is near


def test_a_foreign_owner_does_not_get_the_link() -> None:
    machine = Machine()
    shared = mirror(machine, "gpu1 gpu2")  # the page's device is in no group
    assert isinstance(shared.fault("gpu1"), DmaAddress)
    fault = next(event for event in machine.core.events.events() if event.kind == "fault")
    (reason,) = fault.details["reasons"]
    assert reason.startswith("no link: owner")


def test_without_a_path_it_is_migrated_and_everyone_faults_it_in_again() -> None:
    machine = Machine(tree(no_host_bridge=True))
    shared = mirror(machine)
    fill(machine, shared, b"moved")
    before = shared.fault("gpu1")
    assert isinstance(before, LinkAddress)
    after = shared.fault("gpu2")
    assert after is not None
    assert shared.page.backing.placement is SYSTEM
    assert machine.backend.read(after, 0, 5) == b"moved"
    with pytest.raises(FaultError):
        machine.backend.read(before, 0, 5)
    again = shared.fault("gpu1")
    assert isinstance(again, DmaAddress)
    assert machine.backend.read(again, 0, 5) == b"moved"
    assert machine.backend.held() == 1
    event = next(e for e in machine.core.events.events() if e.kind == "move")
    fault = next(e for e in machine.core.events.events() if e.number == event.cause)
    assert fault.subject == "gpu2 on page0"
    assert "passes no peer-to-peer" in fault.details["reasons"][1]


def test_a_device_that_reaches_nothing_is_named() -> None:
    with pytest.raises(GoneError, match="deaf does not even reach system memory"):
        mirror(Machine()).fault("deaf")


def test_a_migration_that_fails_leaves_the_page_where_it_is() -> None:
    machine = Machine(tree(no_host_bridge=True))
    shared = mirror(machine)
    machine.backend.copy_error = OSError("engine halted")
    with pytest.raises(OSError, match="engine halted"):
        shared.fault("gpu2")
    assert shared.page.backing.placement is DEVICE
    assert machine.backend.held() == 1
    assert isinstance(shared.fault("gpu1"), LinkAddress)
