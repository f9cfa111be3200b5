# SPDX-License-Identifier: Apache-2.0
"""The oracle against IOMMU groups that a Linux 7.2 guest really showed in sysfs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed.topology import load
from testbed.topology.model import from_data
from testbed.topology.oracle import (
    Cpu,
    MapType,
    P2pDecision,
    iommu_groups,
    p2p_decision,
    redirecting_ports,
)
from testbed.topology.placement import place

SHIPPED = Path(__file__).parents[3] / "topologies"


def groups(data: dict[str, Any]) -> list[list[str]]:
    topology = from_data({"rack": "r", "nodes": {"h": data}})
    plan = place(topology).nodes["h"]
    found = iommu_groups(plan, topology.nodes["h"])
    return [sorted(bdf.removeprefix("0000:") for bdf in group) for group in found]


def test_groups_of_a_booted_guest() -> None:
    """Switches with and without ACS, a root port without, multifunction; recorded on 7.2.12."""
    nic = {"nic": "n", "engine": "edu"}
    topology = {
        "pcie": [
            {
                "root_port": "rp0",
                "below": [
                    {
                        "switch": "plain",
                        "below": [
                            {"gpu": "g0", "vram": "1M", "engine": "igb"},
                            {"nic": "a", "engine": "edu"},
                        ],
                    }
                ],
            },
            {
                "root_port": "rp1",
                "below": [
                    {
                        "switch": "redirecting",
                        "acs": "redirect",
                        "below": [
                            {"gpu": "g1", "vram": "1M", "engine": "igb", "doorbell": True},
                            {"nic": "b", "engine": "edu"},
                        ],
                    }
                ],
            },
            {"root_port": "rp2", "acs": "none", "below": [nic]},
        ]
    }
    assert groups(topology) == [
        ["00:00.0"],
        ["00:02.0"],
        ["00:03.0"],
        ["00:04.0", "09:00.0"],  # the port has no ACS: its device joins it
        ["00:1e.0"],
        ["00:1f.0"],
        ["01:00.0"],
        ["02:00.0", "03:00.0", "03:00.1"],  # downstream ports without ACS, each with its slot
        ["02:01.0", "04:00.0"],
        ["05:00.0"],
        ["06:00.0"],
        ["06:01.0"],
        ["07:00.0", "07:00.2"],  # functions of one slot, but
        ["07:00.1"],  # the 82576 (igb) is known to keep to itself
        ["08:00.0"],
    ]


def test_a_redirecting_switch_below_a_plain_one_isolates_nothing() -> None:
    plan = place(load.load(SHIPPED / "nested-switches.yaml", {}))
    found = iommu_groups(plan.nodes["host0"], plan.topology.nodes["host0"])
    (group,) = (g for g in found if plan.nodes["host0"].function("gpu2.vram").bdf in g)
    assert plan.nodes["host0"].function("gpu3.vram").bdf in group


@pytest.mark.parametrize(
    "iommu", [{"kind": "none"}, {"kind": "intel", "mode": "off"}, {"kind": "virtio", "mode": "off"}]
)
def test_without_translation_there_are_no_groups(iommu: dict[str, str]) -> None:
    assert groups({"iommu": iommu}) == []


def test_the_iommus_own_function_is_in_no_group() -> None:
    for kind in ("amd", "virtio"):
        assert groups({"iommu": {"kind": kind}}) == [["00:00.0"], ["00:1e.0"], ["00:1f.0"]]


def test_root_ports_that_share_a_slot() -> None:
    ports = [
        {"root_port": "a", "address": "04.0", "acs": "none"},
        {"root_port": "b", "address": "04.1", "acs": "none"},
        {"root_port": "c", "address": "04.2"},
    ]
    found = groups({"pcie": ports})
    assert ["00:04.0", "00:04.1"] in found
    assert ["00:04.2"] in found


EPYC, MAX = Cpu("AuthenticAMD", 0x17), Cpu("AuthenticAMD", 6)


def decision(file: str, provider: str, client: str, cpu: Cpu = MAX, **more: Any) -> P2pDecision:
    topology = load.load(SHIPPED / f"{file}.yaml", {})
    plan, node = place(topology).nodes["host0"], topology.nodes["host0"]
    more.setdefault("redirecting", redirecting_ports(plan, node))
    return p2p_decision(plan, plan.function(provider), plan.function(client), cpu=cpu, **more)


def test_one_switch_without_redirect_is_the_bus() -> None:
    near = decision("dgx-8gpu", "gpu0.vram", "gpu1.engine")
    assert near == P2pDecision(MapType.BUS, 4, ())


def test_itself_and_functions_of_one_slot() -> None:
    assert decision("dgx-8gpu", "gpu0.vram", "gpu0.vram") == P2pDecision(MapType.BUS, 0, ())
    assert decision("dgx-8gpu", "gpu0.vram", "gpu0.engine") == P2pDecision(MapType.BUS, 2, ())


def test_a_redirecting_root_port_is_on_the_way_between_functions_of_its_slot() -> None:
    found = decision("minimal", "gpu0.vram", "gpu0.engine")
    assert found == P2pDecision(MapType.NONE, 2, ("rp0",))


@pytest.mark.parametrize(
    ("cpu", "host_bridge", "map_type"),
    [
        (MAX, (0x8086, 0x29C0), MapType.NONE),
        (EPYC, (0x8086, 0x29C0), MapType.HOST_BRIDGE),
        (Cpu("GenuineIntel", 0x17), (0x8086, 0x29C0), MapType.NONE),
        (MAX, (0x8086, 0x2032), MapType.HOST_BRIDGE),
        (MAX, (0x1022, 0x2032), MapType.NONE),
        (MAX, (0x1AE0, 0x0001), MapType.HOST_BRIDGE),
    ],
)
def test_redirect_and_two_root_ports_need_a_host_bridge(
    cpu: Cpu, host_bridge: tuple[int, int], map_type: MapType
) -> None:
    apart = decision("two-root-ports", "gpu0.vram", "gpu1.vram", cpu, host_bridge=host_bridge)
    assert apart == P2pDecision(map_type, 4, ())
    redirected = decision("quad-gpu", "gpu0.vram", "gpu1.vram", cpu, host_bridge=host_bridge)
    assert redirected == P2pDecision(map_type, 4, ("sw0.port0", "sw0.port1"))


def test_redirect_turned_off_opens_the_bus() -> None:
    assert decision("quad-gpu", "gpu0.vram", "gpu1.vram", redirecting=()).map_type is MapType.BUS
    topology = load.load(SHIPPED / "quad-gpu.yaml", {})
    plan, node = place(topology).nodes["host0"], topology.nodes["host0"]
    assert redirecting_ports(plan, node) == {plan.function("rp0").bdf, plan.function("rp1").bdf} | {
        plan.function(f"sw0.port{i}").bdf for i in range(6)
    }
    off = replace(node, iommu=replace(node.iommu, mode="off"))
    assert redirecting_ports(plan, off) == frozenset()
    amd = replace(off, iommu=replace(off.iommu, kind="amd"))
    assert redirecting_ports(plan, amd) == redirecting_ports(plan, node)


def test_one_redirecting_port_on_a_longer_way_is_enough() -> None:
    found = decision("nested-switches", "gpu0.vram", "gpu2.vram")
    assert found == P2pDecision(MapType.NONE, 8, ("redirecting.port0",))
    assert decision("nested-switches", "gpu0.vram", "gpu1.vram").map_type is MapType.BUS
    assert decision("nested-switches", "gpu0.vram", "nic0") == P2pDecision(MapType.BUS, 6, ())
