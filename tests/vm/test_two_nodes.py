# SPDX-License-Identifier: Apache-2.0
"""Two machines whose NIC models share a network and whose GPU models share a link."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from testbed.deploy import StartOptions
from testbed.instruments.bench import Bench
from testbed.instruments.model_devices import ModelGpu, ModelNic, copy, place
from testbed.instruments.paths import PathWatch
from testbed.rack import Rack
from testbed.topology import load
from testbed.topology.plan import Role
from tests.vm.conftest import Start

TOPOLOGY = """
rack: two-nodes
nodes:
{% for node in ["one", "two"] %}
  {{ node }}:
    machine: {vcpus: 1, memory: 512M}
    pcie:
      - root_port: rp0
        below: [{gpu: gpu0, vram: 32M, engine: model}]
      - root_port: rp1
        below: [{nic: nic0, engine: model}]
{% endfor %}
links:
  - {kind: xgmi, between: [one/gpu0, two/gpu0], width: 8}
"""
MIB = 1 << 20
BASE = 0x10_0000_0000
RIGHTS = ["local_write", "remote_read", "remote_write"]


class Node:
    """One machine: everything opened, a MiB of its memory pinned as region 1 of its NIC."""

    def __init__(self, rack: Rack, name: str) -> None:
        self.node = rack.node(name)
        functions = [*self.node.plan.by_role(Role.VRAM), *self.node.plan.by_role(Role.ENGINE)]
        self.bench = Bench.open(self.node, functions)
        self.gpu = ModelGpu(self.bench, "gpu0")
        self.nic = ModelNic(self.bench, "nic0")
        self.ram = self.bench.buffer("ram", MIB)
        self.table = self.bench.buffer("table", 4096)
        self.iova = self.bench.mapper.map(self.ram).iova
        self.region(1, self.iova)

    def region(self, index: int, iova: int, **more: Any) -> int:
        params = {"base": BASE * index, "size_bytes": MIB, "rights": RIGHTS, **more}
        return int(self.nic.call("region", index=index, iova=iova, **params)["key"])

    def request(self, op: str, peer: Node, key: int, address: int, size: int) -> dict[str, Any]:
        """Between the start of our region 1 and an address of a region of the peer's."""
        return {
            "op": op, "peer": peer.nic.address, "local_key": self.nic.call("keys")["1"],
            "local_address": BASE, "remote_key": key, "remote_address": address,
            "size_bytes": size,
        }  # fmt: skip


@pytest.fixture(scope="module")
def rack(start: Start, cold: StartOptions) -> Rack:
    return start(load.load_text(TOPOLOGY, "two-nodes.yaml", {}), cold)


@pytest.fixture(scope="module")
def nodes(rack: Rack) -> tuple[Node, Node]:
    return Node(rack, "one"), Node(rack, "two")


@pytest.mark.parametrize("by", ["poll", "interrupt"])
def test_a_nic_writes_into_the_other_machine_and_reads_back(
    nodes: tuple[Node, Node], by: str
) -> None:
    one, two = nodes
    key = two.nic.call("keys")["1"]
    expected = one.ram.fill(0, 64 << 10, len(by))
    with PathWatch(one.nic.witness) as ours, PathWatch(two.nic.witness) as theirs:
        request = one.request("write", two, key, BASE + 4096, 64 << 10)
        assert one.nic.call("submit", requests=[request], by=by)["completed"]
    assert two.ram.judge(4096, expected).holds
    assert ours.moved()["network"][1] == 64 << 10
    assert theirs.moved()["iommu"][1] == 64 << 10  # by its own DMA, behind its own IOMMU
    expected = two.ram.fill(0, 8192, 9)
    request = one.request("read", two, key, BASE, 8192)
    assert one.nic.call("submit", requests=[request], by=by)["completed"]
    assert one.ram.judge(0, expected).holds


def test_a_page_that_is_not_there_is_repaired_by_the_machine_that_owns_it(
    nodes: tuple[Node, Node],
) -> None:
    one, two = nodes
    key = two.region(
        2, two.bench.mapper.map(two.table).iova, size_bytes=8 * 4096, table=two.table.target
    )
    expected = one.ram.fill(0, 4096, 3)
    request = one.request("write", two, key, 2 * BASE + 4096, 4096)
    batch = one.nic.call("submit", requests=[request], wait=False)["batch"]
    (fault,) = two.nic.call("faults", timeout_s=10.0, by="interrupt")["faults"]
    assert (fault["address"], fault["write"], fault["command"]) == (2 * BASE + 4096, True, key)
    assert not one.nic.call("wait", batch=batch, timeout_s=0.05)["ended"]
    two.nic.call("resolve", pages=[{"index": 2, "page": 1, "iova": two.iova + MIB // 2}])
    assert one.nic.call("wait", batch=batch)["completed"]
    assert two.ram.judge(MIB // 2, expected).holds
    two.nic.call("remove", index=2)


def test_what_the_other_machine_does_not_allow_fails_here_and_changes_nothing_there(
    nodes: tuple[Node, Node],
) -> None:
    one, two = nodes
    key = two.region(3, two.iova, rights=["remote_read"])
    stays = two.ram.fill(0, 4096, 7)
    answer = one.nic.call("submit", requests=[one.request("write", two, key, 3 * BASE + 64, 64)])
    assert answer["status"] == {"cause": "link_refused", "address": 3 * BASE + 64}
    assert two.ram.judge(0, stays).holds
    two.nic.call("remove", index=3)


def test_a_gpu_reaches_the_other_machine_s_video_memory_over_the_link(
    nodes: tuple[Node, Node],
) -> None:
    one, two = nodes
    window = {"mode": "physical", "offset": 4 * MIB, "size_bytes": 8 * MIB}
    assert two.gpu.call("link_export", link=0, **window)["synchronized"]
    expected = one.gpu.vram.fill(0, 8192, 5)
    with PathWatch(one.gpu.witness) as watch:
        answer = one.gpu.submit(copy(place("vram", 0), place("link", 4096, 0), 8192))
    assert answer["completed"]
    assert two.gpu.vram.judge(4 * MIB + 4096, expected).holds
    assert watch.judge("link", 8192).holds


def test_a_machine_that_dies_is_a_refused_request_and_a_link_that_is_down(
    rack: Rack, nodes: tuple[Node, Node]
) -> None:
    """The last one: node two is gone."""
    one, two = nodes
    key, peer = two.nic.call("keys")["1"], two
    one.gpu.submit({"op": "nop"}, by="interrupt")
    (pid,) = [
        process["pid"]
        for process in rack.keeper.status()["processes"]
        if process["kind"] == "qemu" and process["name"] == "two"
    ]
    os.kill(pid, signal.SIGKILL)
    assert one.gpu.call("link_wait", link=0, state="down", by="interrupt")["reached"]
    answer = one.gpu.submit(copy(place("vram", 0), place("link", 0, 0), 8))
    assert answer["status"] == {"cause": "link_down", "address": 0}
    answer = one.nic.call("submit", requests=[one.request("write", peer, key, BASE, 64)])
    assert answer["ended"], answer
    assert not answer["completed"]
    assert one.node.alive
