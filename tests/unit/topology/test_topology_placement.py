# SPDX-License-Identifier: Apache-2.0
"""Placement: addresses, windows, limits. That guests see these numbers is shown in tests/vm."""

from __future__ import annotations

from typing import Any

import pytest

from testbed.errors import InputError
from testbed.topology.model import from_data
from testbed.topology.placement import place
from testbed.topology.plan import NodePlan, Role
from testbed.topology.units import GIB, MIB


def planned(*pcie: dict[str, Any], **node: Any) -> NodePlan:
    topology = from_data({"rack": "r", "nodes": {"h": {"pcie": list(pcie), **node}}})
    return place(topology).nodes["h"]


def addresses(plan: NodePlan) -> dict[str, str]:
    return {f.name: f.bdf.removeprefix("0000:") for f in plan.functions}


def port(name: str, *below: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"root_port": name, "below": list(below), **more}


def switch(name: str, *below: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"switch": name, "below": list(below), **more}


def nic(name: str, **more: Any) -> dict[str, Any]:
    return {"nic": name, "engine": "edu", **more}


def test_buses_are_numbered_depth_first() -> None:
    inner = switch("s1", nic("a"), nic("b"))
    plan = planned(port("p0", switch("s0", inner, nic("c"))), port("p1"), port("p2", nic("d")))
    assert addresses(plan) == {
        "net0": "00:1e.0",
        "p0": "00:02.0",
        "s0": "01:00.0",
        "s0.port0": "02:00.0",
        "s1": "03:00.0",
        "s1.port0": "04:00.0",
        "a": "05:00.0",
        "s1.port1": "04:01.0",
        "b": "06:00.0",
        "s0.port1": "02:01.0",
        "c": "07:00.0",
        "p1": "00:03.0",
        "p2": "00:04.0",
        "d": "09:00.0",
    }
    assert plan.last_bus == 9
    spans = {
        f.name: (f.secondary_bus, f.subordinate_bus) for f in plan.functions if f.secondary_bus
    }
    assert spans["p0"] == (1, 7)
    assert spans["s0.port0"] == (3, 6)
    assert spans["p1"] == (8, 8)  # an empty port has a bus too


def test_slots_decide_the_order_and_not_the_file() -> None:
    plan = planned(port("late", nic("a"), address="05.0"), port("early", nic("b"), address="03.0"))
    assert addresses(plan)["b"] == "01:00.0"
    assert addresses(plan)["a"] == "02:00.0"


def test_gaps_around_explicit_addresses_are_filled() -> None:
    plan = planned(nic("a"), nic("b", address="02.0"), nic("c"), nic("d", address="04.0"))
    assert addresses(plan) == {
        "net0": "00:1e.0",
        "b": "00:02.0",
        "a": "00:03.0",
        "d": "00:04.0",
        "c": "00:05.0",
    }


def test_slot_1_is_free_unless_an_iommu_stands_there() -> None:
    assert addresses(planned(nic("a", address="01.0")))["a"] == "00:01.0"
    virtio = planned(nic("a"), iommu={"kind": "virtio"})
    assert addresses(virtio)["iommu0"] == "00:01.0"
    off = planned(nic("a", address="01.0"), iommu={"kind": "virtio", "mode": "off"})
    assert "iommu0" not in addresses(off)


def test_a_gpus_functions() -> None:
    plan = planned(
        {"gpu": "g0", "vram": "1M", "engine": "igb", "doorbell": True},
        {"gpu": "g1", "vram": "2M", "engine": "model"},
        {"gpu": "g2", "vram": "4M", "engine": "edu", "doorbell": True},
        {"nvme": "n", "size": "64M"},
    )
    names = [f.name for f in plan.functions if f.role is not Role.NETWORK]
    assert names == [
        *("g0.vram", "g0.engine", "g0.doorbell", "g1.vram", "g1.engine", "g2.vram", "g2.engine"),
        "n",
    ]
    assert [f.number for f in plan.of_device("g0")] == [0, 1, 2]
    assert all(f.multifunction for f in plan.of_device("g1"))
    assert [f.memory_fd for f in plan.by_role(Role.VRAM, Role.NVME)] == [100, 101, 102, 103]
    assert plan.function("g1.vram").vram_size_bytes == 2 * MIB
    with pytest.raises(KeyError):
        plan.function("g9")


def test_acs_is_where_the_topology_says() -> None:
    plan = planned(
        port("p0", switch("s0", nic("a"), acs="redirect")),
        port("p1", switch("s1", nic("b")), acs="none"),
    )
    assert {f.name for f in plan.functions if f.acs} == {"p0", "s0.port0"}


@pytest.mark.parametrize(
    ("sizes", "hole_gib"),
    [
        (["64M"] * 4, 32),
        (["8G"], 32),
        (["8G", "8G"], 32),
        (["8G", "8G", "8G", "1M"], 64),  # 32G of windows, and up to 8G before they start
        (["16G", "16G"], 64),
        (["128G"], 256),
    ],
)
def test_the_window_above_4_gib_holds_all_vram(sizes: list[str], hole_gib: int) -> None:
    ports = [port(f"p{i}", {"gpu": f"g{i}", "vram": v}) for i, v in enumerate(sizes)]
    assert planned(*ports).pci_hole64_bytes == hole_gib * GIB


def test_windows_grow_at_each_level_of_bridges() -> None:
    """16G + 1M below one switch need 32G there; plain sums would make it 64G in all."""
    switches = []
    for i in range(2):
        large, small = {"gpu": f"large{i}", "vram": "16G"}, {"gpu": f"small{i}", "vram": "1M"}
        switches.append(port(f"p{i}", switch(f"s{i}", large, small)))
    assert planned(*switches).pci_hole64_bytes == 128 * GIB


def test_a_passed_through_device_is_given_room_and_not_counted_against_tcg() -> None:
    cards = [{"passthrough": f"c{i}", "host": f"0000:0{i}:00.0"} for i in range(8)]
    assert planned(*cards).pci_hole64_bytes == 2048 * GIB


def test_256_buses_and_not_one_more() -> None:
    def rack(last: int) -> list[dict[str, Any]]:
        full = [
            port(f"p{s}", switch(f"s{s}", *[nic(f"n{s}-{i}") for i in range(29)])) for s in range(8)
        ]
        return [*full, *[port(f"q{i}") for i in range(last)]]

    assert planned(*rack(7)).last_bus == 255
    with pytest.raises(InputError, match="rack r, node h: node 'h' needs 257 buses"):
        planned(*rack(8))


def test_problems_of_several_nodes_come_together() -> None:
    same = {"pcie": [nic("a"), nic("a")]}
    with pytest.raises(InputError) as caught:
        place(from_data({"rack": "r", "nodes": {"x": same, "y": same}}))
    assert len(caught.value.diagnostics) == 2
