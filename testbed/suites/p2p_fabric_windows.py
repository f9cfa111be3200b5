# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-fabric``, third part: what a node's CPU sees of another node's memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from testbed import fabric
from testbed.errors import CapabilityMissing
from testbed.harness.racks import LiveRack
from testbed.instruments.memory import VRAM_BAR, Memory
from testbed.instruments.observer import Observer, Refuted
from testbed.rack import Rack
from testbed.results.evidence import Counter
from testbed.results.judging import PAGE_BYTES
from testbed.suites.p2p_fabric import TARGET
from testbed.suites.p2p_fabric_ground import Way
from testbed.topology.plan import Role

pytest_plugins = ["testbed.suites.p2p_fabric_ground"]

FOUND_TIMEOUT_S = 20.0
_POLL_S = 0.1


@pytest.mark.requirement("FAB-03")
def test_a_cpu_sees_a_peer_through_a_window_alone(
    rack: LiveRack, between: Way, observe: Observer
) -> None:
    """Plugged in, its writes reach the owner's memory; pulled out, no address leads there."""
    running = rack.get()
    if not isinstance(running, Rack):
        raise CapabilityMissing("a rack whose machines are here")
    node = running.node(between.initiator.node)
    parents = {f.parent for f in node.plan.functions}
    ports = [f for f in node.plan.by_role(Role.ROOT_PORT) if f.qemu_id not in parents]
    if not ports:
        raise CapabilityMissing("an empty root port, for a window")
    before = _devices(node.agent)
    began_s = time.monotonic()
    window = fabric.plug(running, node.name, ports[0].device, f"{between.owner.name}.vram")
    try:
        bdf, bar = _found(node.agent, before, began_s + FOUND_TIMEOUT_S)
        observe.add(Counter("window found after", _ns(began_s), "ns"))
        opened = node.agent.call("raw.open", devices=[bdf])
        there = Memory(node, "window", bar["size_bytes"], {"bar": bdf, "index": VRAM_BAR})
        expected = there.fill(TARGET, PAGE_BYTES, 80)
        observe.require(between.owner.gpu.vram.judge(TARGET, expected))
        observe.require(there.judge(TARGET, between.owner.gpu.vram.fill(TARGET, PAGE_BYTES, 81)))
        node.agent.call("raw.close", container=opened["container"])
    finally:
        pulled_s = fabric.pull(running, window)
    observe.add(Counter("window gone after", int(pulled_s * 1e9), "ns"))
    if _devices(node.agent).keys() != before.keys():
        raise Refuted("the guest still has the window's function")
    observe.conclude(f"found, written and read by the CPU, gone {pulled_s:.1f} s after the pull")


def _devices(agent: Any) -> dict[str, Mapping[str, Any]]:
    return {device["bdf"]: device for device in agent.call("pci.tree")["devices"]}


def _found(
    agent: Any, before: Mapping[str, Any], deadline_s: float
) -> tuple[str, Mapping[str, Any]]:
    """The new function, and its memory, once it has an address."""
    while time.monotonic() < deadline_s:
        for bdf, device in _devices(agent).items():
            for bar in device["bars"] if bdf not in before else ():
                if bar["index"] == VRAM_BAR and bar["address"]:
                    return bdf, bar
        time.sleep(_POLL_S)
    raise Refuted("the guest did not find the window, or had no room for it")


def _ns(began_s: float) -> int:
    return int((time.monotonic() - began_s) * 1e9)
