# SPDX-License-Identifier: Apache-2.0
"""What `topo` leaves alone: functions that a driver or a mount uses are not measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from testbed.instruments.p2p_moves import engine_moves
from testbed.rack_node import RackNode
from testbed.topology import load
from testbed.topology.matrix import Measured, Unknown
from testbed.topology.peers import peers
from testbed.topology.placement import place
from testbed.topology.plan import RackPlan

TOPOLOGY = """\
rack: r
nodes:
  h:
    pcie:
      - root_port: rp0
        below:
          - switch: s
            below: [{gpu: a, vram: 16M}, {gpu: b, vram: 16M}, {nvme: d, cmb: 16M}, {nic: n}]
"""


class Taken(Exception):
    """The devices were opened."""


@dataclass
class FakeNode:
    """A machine that must not be touched; it can only say what is mounted."""

    plan: RackPlan
    mounts: bytes = b""
    asked: list[str] = field(default_factory=list)

    @property
    def spec(self) -> Any:
        return self.plan.topology.nodes["h"]

    @property
    def link(self) -> Any:
        def run(command: str, **_: Any) -> Any:
            self.asked.append(command)
            return SimpleNamespace(stdout=self.mounts)

        return SimpleNamespace(run=run)

    def host_memory(self, name: str) -> Any:
        raise Taken(name)


@pytest.fixture
def plan() -> RackPlan:
    return place(load.load_text(TOPOLOGY, "r", {}))


def moved(plan: RackPlan, drivers: dict[str, str], mounts: bytes = b"") -> Any:
    """With all functions in one IOMMU group."""
    node = FakeNode(plan, mounts)
    tree = [
        {
            "bdf": function.bdf,
            "iommu_group": 7,
            "header": "bridge" if function.secondary_bus else "endpoint",
            "driver": "pcieport" if function.secondary_bus else drivers.get(function.name, ""),
        }
        for function in plan.nodes["h"].functions
        if function.device != "net0"
    ]
    return engine_moves(cast(RackNode, node), peers(plan), tree)


def test_free_functions_are_taken(plan: RackPlan) -> None:
    with pytest.raises(Taken):
        moved(plan, {"d": "nvme"}, b"proc /proc proc rw 0 0\n")


@pytest.mark.parametrize(
    ("drivers", "mounts", "why"),
    [
        ({"a.engine": "mydriver"}, b"", "belongs to the driver mydriver"),
        ({"n": "mydriver"}, b"", "belongs to the driver mydriver"),
        ({"d": "nvme"}, b"/dev/nvme0n1 /mnt ext4 rw 0 0\n", "is mounted"),
    ],
)
def test_what_is_used_is_left_alone(
    plan: RackPlan, drivers: dict[str, str], mounts: bytes, why: str
) -> None:
    found = moved(plan, drivers, mounts)["a", "b"]
    assert isinstance(found, Unknown)
    assert why in found.why


def test_what_nobody_can_move_says_why(plan: RackPlan) -> None:
    found = moved(plan, {"a.engine": "mydriver"})
    assert "a NIC has no memory" in found["a", "n"].why
    assert "its driver's" in found["a", "d"].why
    assert ("d", "a") not in found  # the kernel is told to move these
    assert not any(isinstance(each, Measured) for each in found.values())
