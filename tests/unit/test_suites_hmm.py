# SPDX-License-Identifier: Apache-2.0
"""Judgements about device-private memory, on what a module and a page table might say."""

from __future__ import annotations

from typing import Any

import pytest

from testbed.instruments.dmabuf import BufferPair
from testbed.instruments.mutations import Mutation
from testbed.instruments.private_memory import PAGES, PEER, STOCK, Mirror, Workplace
from testbed.topology import load, placement
from testbed.topology.machine import Iommu
from testbed.topology.oracle import Route

BAR = 0x1_0000_0000
TOPOLOGY = """\
rack: a
nodes:
  host0:
    pcie:
      - root_port: rp0
        below: [{gpu: gpu0, vram: 16M}]
      - root_port: rp1
        below: [{gpu: gpu1, vram: 16M}]
"""


class FakeNode:
    """Its agent answers what it was told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.agent = self
        self.asked: list[dict[str, Any]] = []
        self.physical = [-1] * PAGES
        self.to_ram = 0
        self.pages: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> Any:
        if method == "hmm.mirror":
            self.asked.append(params)
            return {"errno": 0, "told": 0, "pages": self.pages}
        if method == "hmm.state":
            return {"told": PAGES, "pages": self.pages}
        return {
            "hmm.owner": {"used": 0, "to_ram": self.to_ram},
            "hmm.pages": {"physical": self.physical},
        }.get(method, {})


def workplace(
    node: FakeNode, *, by_iova: bool = True, mutation: Mutation = Mutation.NONE
) -> Workplace:
    plan = placement.place(load.load_text(TOPOLOGY, "a.yaml", {})).nodes["host0"]
    named = {function.name: function for function in plan.functions}
    pair = BufferPair("host0", named["gpu1.engine"], named["gpu0.vram"], Route.ROOT)
    own = named["gpu0.engine"]
    return Workplace(node, pair, own, Iommu(), by_iova, BAR, True, mutation)  # type: ignore[arg-type]


def looked(node: FakeNode, place: Workplace, pages: list[dict[str, Any]]) -> Mirror:
    memory = place.memory()
    memory.offsets = {page: page * 4096 for page in range(PAGES)}
    node.pages = pages
    return memory.look(PEER)


def pages(kind: str, base: int, *, bus: int) -> list[dict[str, Any]]:
    return [{"address": base + 4096 * n, "kind": kind, "bus": bus} for n in range(PAGES)]


@pytest.mark.parametrize(
    ("by_iova", "seen", "holds", "reason"),
    [
        (True, pages("peer", 0xFFF0000, bus=0), True, "as the topology has it"),
        (True, pages("peer", BAR, bus=1), False, "0x100000000 instead of an IOVA"),
        (True, pages("peer", BAR, bus=0), False, "instead of an IOVA"),
        (False, pages("peer", BAR, bus=1), True, "as the topology has it"),
        (False, pages("peer", BAR, bus=0), False, "instead of the BAR's 0x100000000"),
        (False, pages("peer", BAR + 4096, bus=1), False, "0x100001000 instead of the BAR's"),
        (False, pages("system", 0x1000, bus=0), False, "page 0: system, not a peer's"),
    ],
)
def test_addresses_follow_the_topology(
    by_iova: bool, seen: list[dict[str, Any]], holds: bool, reason: str
) -> None:
    node = FakeNode()
    judgement = looked(node, workplace(node, by_iova=by_iova), seen).judge_peers()
    assert judgement.holds is holds
    assert reason in judgement.reason


@pytest.mark.parametrize(
    ("physical", "to_ram", "in_video", "in_system"),
    [
        ([-1] * PAGES, 0, True, False),
        ([0x1000] * PAGES, PAGES, False, True),
        ([0x1000] * PAGES, 0, False, False),  # nobody's fault took them back
        ([-1] * PAGES, PAGES, False, False),
        ([0x1000, *[-1] * (PAGES - 1)], 1, False, False),
    ],
)
def test_where_pages_are(physical: list[int], to_ram: int, in_video: bool, in_system: bool) -> None:
    node = FakeNode()
    memory = workplace(node).memory()
    node.physical, node.to_ram = physical, to_ram
    assert memory.judge_in_video().holds is in_video
    assert memory.judge_in_system().holds is in_system


def test_who_was_told_has_nothing_left() -> None:
    node = FakeNode()
    mirror = looked(node, workplace(node), pages("none", 0, bus=0))
    assert mirror.judge_told().holds
    node.pages = pages("peer", BAR, bus=1)
    assert not mirror.judge_told().holds


@pytest.mark.parametrize(
    ("mutation", "peer", "stock", "own"),
    [
        (Mutation.NONE, ["peer2peer"], [], ["group=0000:01:00.0"]),
        (Mutation.HMM_MIGRATE_ALL, [], [], ["group=0000:01:00.0"]),
        (Mutation.HMM_NO_CHECK, ["no-check"], [], ["group=0000:01:00.0"]),
        (Mutation.HMM_FAKE_PAGE, ["fake"], [], ["group=0000:01:00.0"]),
        (Mutation.HMM_ANY_GROUP, ["peer2peer"], ["group=0000:01:00.0"], ["group=0000:01:00.0"]),
        (Mutation.HMM_NO_GROUP, ["peer2peer"], [], []),
    ],
)
def test_a_break_changes_how_one_device_looks(
    mutation: Mutation, peer: list[str], stock: list[str], own: list[str]
) -> None:
    node = FakeNode()
    place = workplace(node, mutation=mutation)
    memory = place.memory()
    memory.look(PEER)
    memory.look(STOCK)
    assert place.own_engine is not None
    memory.look_as_owner(place.own_engine)
    assert [asked["manners"] for asked in node.asked] == [peer, stock, own]
