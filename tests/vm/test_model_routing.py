# SPDX-License-Identifier: Apache-2.0
"""Peer traffic of models below switches: the raw bus address, with and without redirection."""

from __future__ import annotations

from typing import Any

import pytest

from guest_agent.pattern import pattern
from testbed.deploy import StartOptions
from testbed.instruments.bench import Bench, CopyStatus, Engine
from testbed.instruments.faults import FaultWatch
from testbed.instruments.memory import Memory
from testbed.models.registers import Common
from testbed.rack_node import RackNode
from testbed.results.evidence import Witness
from testbed.results.judging import FaultWindow
from testbed.topology import load
from testbed.topology.plan import Role
from tests.vm.conftest import Start

TOPOLOGY = """\
rack: routing
nodes:
  host0:
    machine: {cpu: max, vcpus: 1, memory: 512M}
    iommu: {kind: intel, mode: strict}
    pcie:
      - root_port: rp0
        below:
          - switch: plain
            below:
              - {gpu: gpu0, vram: 16M, engine: model}
              - {gpu: gpu1, vram: 16M, engine: model}
      - root_port: rp1
        below:
          - switch: strict
            acs: redirect
            below:
              - {gpu: gpu2, vram: 16M, engine: model}
              - {gpu: gpu3, vram: 16M, engine: model}
"""
SIZE_BYTES = 64 << 10
TARGET = 1 << 20
ACS_CONTROL = 0x14E  # of `pcie-root-port`
REDIRECT = 0x04
COMMAND = 0x04
MEMORY_SPACE = 0x02


@pytest.fixture(scope="module")
def node(start: Start, cold: StartOptions) -> RackNode:
    return start(load.load_text(TOPOLOGY, "routing.yaml", {}), cold).node()


@pytest.fixture(scope="module")
def bench(node: RackNode) -> Bench:
    """All GPUs in one container. Not closed: the machine's end does that."""
    return Bench.open(node, node.plan.by_role(Role.VRAM, Role.ENGINE))


class Pair:
    """A GPU that copies its own memory's start to a peer's raw bus address."""

    def __init__(self, bench: Bench, requester: str, peer: str) -> None:
        function = bench.node.plan.function
        self.bench = bench
        self.requester = requester
        self.peer = peer
        self.own: Memory = bench.vram(function(f"{requester}.vram"))
        self.theirs: Memory = bench.vram(function(f"{peer}.vram"))
        self.engine: Engine = bench.engine(function(f"{requester}.engine"))
        self.iova = bench.mapper.map(self.own).iova

    def copy(self, seed: int) -> tuple[CopyStatus, FaultWindow]:
        self.own.fill(0, SIZE_BYTES, seed)
        assert self.theirs.bus_address is not None
        with FaultWatch(self.bench.node, machine_watched=True) as watch:
            status = self.engine.copy(self.iova, self.theirs.bus_address + TARGET, SIZE_BYTES)
        return status, watch.window

    def arrived(self, seed: int) -> bool:
        with self.bench.node.host_memory(f"{self.peer}.vram") as view:
            return view[TARGET : TARGET + SIZE_BYTES] == pattern(seed, 0, SIZE_BYTES)

    def counters(self) -> dict[str, dict[str, int]]:
        counters: dict[str, dict[str, int]] = self.bench.node.models.call(
            "counters", device=self.requester
        )
        return counters


def set_bit(node: RackNode, function: str, offset: int, bit: int, *, on: bool) -> None:
    """As `setpci` would."""
    bdf = node.plan.function(function).bdf
    script = (
        f"f = open('/sys/bus/pci/devices/{bdf}/config', 'r+b', 0)\n"
        f"f.seek({offset}); old, high = f.read(2); f.seek({offset})\n"
        f"f.write(bytes([old | {bit} if {on} else old & ~{bit}, high]))\n"
    )
    result = node.link.run("python3 -", stdin=script.encode())
    assert result.exit_status == 0, result.stderr


def set_redirect(node: RackNode, port: str, *, on: bool) -> None:
    set_bit(node, port, ACS_CONTROL, REDIRECT, on=on)


def routes(node: RackNode, requester: str, **wanted: Any) -> list[dict[str, Any]]:
    found = node.models.call("routes", device=requester)
    return [entry for entry in found if all(entry.get(k) == v for k, v in wanted.items())]


def test_below_a_plain_switch_the_iommu_sees_nothing_of_a_copy(
    node: RackNode, bench: Bench
) -> None:
    pair = Pair(bench, "gpu0", "gpu1")
    status, window = pair.copy(1)
    counters = pair.counters()
    assert status.completed
    assert pair.arrived(1)
    assert not window.records
    assert counters["peer"]["written_bytes"] == SIZE_BYTES
    assert counters["events"]["routes_unknown"] == 0
    (route,) = routes(node, "gpu0", memory="gpu1.vram")
    assert (route["outcome"], route["why"]) == ("peer", "routed by plain")
    assert route["address"] == pair.theirs.bus_address


def test_below_a_plain_switch_a_peers_doorbell_rings(node: RackNode, bench: Bench) -> None:
    pair = Pair(bench, "gpu0", "gpu1")
    (route,) = routes(node, "gpu0", device="gpu1")
    rung = node.models.call("counters", device="gpu1")["events"]["doorbells"]
    assert pair.engine.write32(route["address"] + Common.DOORBELL_NOTIFY, 7).completed
    assert node.models.call("counters", device="gpu1")["events"]["doorbells"] == rung + 1


def test_a_peer_that_decodes_no_memory_is_not_there(node: RackNode, bench: Bench) -> None:
    pair = Pair(bench, "gpu0", "gpu1")
    pair.theirs.fill(TARGET, SIZE_BYTES, 9)
    set_bit(node, "gpu1.vram", COMMAND, MEMORY_SPACE, on=False)
    status, window = pair.copy(2)
    set_bit(node, "gpu1.vram", COMMAND, MEMORY_SPACE, on=True)
    assert not status.completed
    assert pair.arrived(9)
    assert not window.records
    assert pair.copy(3)[0].completed
    assert pair.arrived(3)


def test_below_a_redirecting_switch_the_iommu_refuses_it_until_redirection_is_off(
    node: RackNode, bench: Bench
) -> None:
    pair = Pair(bench, "gpu2", "gpu3")
    for seed, redirects in enumerate((True, False, True), 1):
        set_redirect(node, "strict.port0", on=redirects)
        peer_bytes = pair.counters()["peer"]["written_bytes"]
        status, window = pair.copy(seed)
        assert status.completed is pair.arrived(seed) is not redirects
        machine = [r for r in window.records if r.witness is Witness.MACHINE]
        if redirects:
            assert {record.requester for record in machine} == {pair.engine.requester}
        else:
            assert not window.records
        moved = pair.counters()["peer"]["written_bytes"] - peer_bytes
        assert moved == (0 if redirects else SIZE_BYTES)
    assert pair.counters()["events"]["routes_unknown"] == 0


def test_a_port_redirects_what_comes_in_not_what_goes_out(node: RackNode) -> None:
    set_redirect(node, "strict.port1", on=False)
    try:
        outcomes = [
            routes(node, requester, memory=f"{peer}.vram")[0]["outcome"]
            for requester, peer in (("gpu2", "gpu3"), ("gpu3", "gpu2"))
        ]
    finally:
        set_redirect(node, "strict.port1", on=True)
    assert outcomes == ["upstream", "peer"]
