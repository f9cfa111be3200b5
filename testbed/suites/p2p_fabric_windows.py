# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-fabric``, third part: what a node's CPU and its plain PCIe devices see of another
node's memory, through a window that the host plugs in and pulls out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from testbed import fabric
from testbed.errors import CapabilityMissing, HostError
from testbed.harness.racks import LiveRack
from testbed.instruments.bench import Bench
from testbed.instruments.mapper import Mapping as Mapped
from testbed.instruments.memory import VRAM_BAR, Memory
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.instruments.reasons import reasons_of
from testbed.rack import Rack
from testbed.rack_node import RackNode
from testbed.results.evidence import Access, Counter
from testbed.results.judging import PAGE_BYTES, judge_fault
from testbed.suites.fabric_ways import TARGET, Way
from testbed.suites.p2p_fabric_ground import has_fabric
from testbed.topology.plan import Function, Role

pytest_plugins = ["testbed.suites.p2p_fabric_ground"]
pytestmark = pytest.mark.boots(when=has_fabric)

FOUND_TIMEOUT_S = 30.0
WANTED_TIMEOUT_S = 60.0  # Linux lets 5 s pass in which the button can be pressed once more
HELD_S = 0.5
HELD_COPIES = 4
_POLL_S = 0.1


@dataclass(frozen=True)
class Place:
    """An empty root port of a node, for a window to another node's memory."""

    rack: Rack
    node: RackNode
    port: str

    def qemu_objects(self) -> set[str]:
        """What QEMU has by name: memories behind windows among it."""
        return {each["name"] for each in self.node.qmp("qom-list", path="/objects")}

    def devices(self) -> dict[str, Mapping[str, Any]]:
        """What the guest has."""
        found = self.node.agent.call("pci.tree")["devices"]
        return {device["bdf"]: device for device in found}


@pytest.fixture
def place(rack: LiveRack, between: Way) -> Place:
    """Where the initiator's node takes a window."""
    running = rack.get()
    if not isinstance(running, Rack):
        raise CapabilityMissing("a rack whose machines are here")
    node = running.node(between.initiator.node)
    parents = {f.parent for f in node.plan.functions}
    ports = [f for f in node.plan.by_role(Role.ROOT_PORT) if f.qemu_id not in parents]
    if not ports:
        raise CapabilityMissing("an empty root port, for a window")
    return Place(running, node, ports[0].device)


@contextmanager
def _window(place: Place, memory: str, observe: Observer) -> Iterator[tuple[fabric.Window, Memory]]:
    """Plugged in and found by the guest; pulled out at the end, if that was not done."""
    before = place.devices()
    objects = place.qemu_objects()
    began_s = time.monotonic()
    window = fabric.plug(place.rack, place.node.name, place.port, memory)
    try:
        bdf, bar = _found(place, before, began_s + FOUND_TIMEOUT_S)
        observe.add(Counter("window found after", _ns(began_s), "ns"))
        target = {"bar": bdf, "index": VRAM_BAR}
        yield window, Memory(place.node, "window", bar["size_bytes"], target, bar["address"])
    finally:
        if window.backend in place.qemu_objects():
            pulled_s = fabric.pull(place.rack, window, timeout_s=WANTED_TIMEOUT_S)
            observe.add(Counter("window gone after", int(pulled_s * 1e9), "ns"))
    if place.devices().keys() != before.keys() or place.qemu_objects() != objects:
        raise Refuted("the machine still has something of the window")


@pytest.mark.requirement("FAB-03")
def test_a_cpu_sees_a_peer_through_a_window_alone(
    place: Place, between: Way, mutation: Mutation, observe: Observer
) -> None:
    """Plugged in, its writes reach the owner's memory; pulled out, no address leads there."""
    owner, agent = between.owner, place.node.agent
    before = place.devices()
    with _window(place, f"{owner.name}.vram", observe) as (window, there):
        opened = agent.call("raw.open", devices=[there.target["bar"]])
        expected = there.fill(TARGET, PAGE_BYTES, 80)
        observe.require(owner.gpu.vram.judge(TARGET, expected))
        observe.require(there.judge(TARGET, owner.gpu.vram.fill(TARGET, PAGE_BYTES, 81)))
        agent.call("raw.close", container=opened["container"])
        if mutation is not Mutation.FABRIC_KEEP_WINDOW:
            pulled_s = fabric.pull(place.rack, window, timeout_s=WANTED_TIMEOUT_S)
            observe.add(Counter("window gone after", int(pulled_s * 1e9), "ns"))
        if place.devices().keys() != before.keys():
            raise Refuted("the guest still has the window's function")
    observe.conclude("found, written and read by the CPU, gone after the pull")


@pytest.mark.requirement("FAB-10")
def test_a_window_is_pulled_out_under_a_device_s_load(
    rack: LiveRack, place: Place, between: Way, mutation: Mutation, observe: Observer
) -> None:
    """A PCIe device reads and writes the owner's memory through it, also while the guest is asked
    for it. Who holds it is named; once it is let go, the device's DMA is refused by its IOMMU, and
    everything else goes on.
    """
    owner, agent = between.owner, place.node.agent
    card = _card(place.node)
    bench = Bench.open(place.node, [card])
    try:
        with _window(place, f"{owner.name}.vram", observe) as (window, there):
            bdf = there.target["bar"]
            held = agent.call("vfio.open", devices=[bdf])["container"]
            agent.call("fabric.watch_window", container=held, device=bdf)
            load = _Load(bench, card, there, between, observe)
            load.both_ways(82)
            fabric.ask_back(place.rack, window)
            _until_wanted(agent, held, bdf, load)
            for seed in range(83, 83 + HELD_COPIES):
                load.both_ways(seed)  # until it is let go of
            _not_gone(place.rack, window, observe)
            if mutation is not Mutation.FABRIC_KEEP_MAPPED:
                bench.mapper.unmap(load.target)
            agent.call("vfio.close", container=held)
            fabric.await_gone(place.rack, window, timeout_s=WANTED_TIMEOUT_S)
            load.refused(reasons_of(rack.topology.nodes[place.node.name].iommu).unmapped_write)
        state = between.alloc(PAGE_BYTES, virtual=True)
        state.link(TARGET, PAGE_BYTES)
        state.sync(0, PAGE_BYTES)
        virtual = between.map(state.address()[0], PAGE_BYTES)
        observe.require(between.deliver(virtual, TARGET, 84, PAGE_BYTES))
    finally:
        bench.close()
    observe.conclude(
        f"{card.device} used it until it was let go of, {load.copies} copies, and was refused"
        " then; the link carries on, nothing is left"
    )


class _Load:
    """A device that copies to and from the window."""

    def __init__(
        self, bench: Bench, card: Function, there: Memory, way: Way, observe: Observer
    ) -> None:
        self._bench = bench
        self._card = card
        self._engine = bench.engine(card)
        self._owner = way.owner
        self._observe = observe
        self._ram = bench.buffer("window-load", PAGE_BYTES)
        self._source: Mapped = bench.mapper.map(self._ram)
        self.target: Mapped = bench.mapper.map(there, TARGET, PAGE_BYTES)
        self.copies = 0

    def write(self, seed: int) -> None:
        """One copy to the owner, whose guest and host see it."""
        expected = self._ram.fill(0, PAGE_BYTES, seed)
        vram = self._owner.gpu.vram
        source, target = self._source.iova, self.target.iova
        self._observe.require(
            self._bench.deliver(
                self._engine, source, target, into=vram, offset=TARGET, expected=expected, path=None
            )
        )
        self.copies += 1

    def both_ways(self, seed: int) -> None:
        """One copy there, and one back of what the owner's guest has written."""
        self.write(seed)
        expected = self._owner.gpu.vram.fill(TARGET, PAGE_BYTES, seed + 100)
        source, target = self.target.iova, self._source.iova
        self._observe.require(
            self._bench.deliver(
                self._engine, source, target, into=self._ram, offset=0, expected=expected, path=None
            )
        )
        self.copies += 1

    def refused(self, reasons: Any) -> None:
        """One more copy: the IOMMU names the device and the address, and no byte arrives."""
        before = self._owner.gpu.vram.read(TARGET, PAGE_BYTES)
        self._ram.fill(0, PAGE_BYTES, 99)
        with self._bench.watch() as watch:
            self._engine.copy(self._source.iova, self.target.iova, PAGE_BYTES)
        self._observe.require(
            judge_fault(
                watch.window,
                requester=self._engine.requester,
                address=self.target.iova,
                access=Access.WRITE,
                reasons=reasons,
                size_bytes=PAGE_BYTES,
            )
        )
        self._observe.require(self._owner.gpu.vram.judge(TARGET, before))


def _card(node: RackNode) -> Function:
    cards = [f for f in node.plan.by_role(Role.ENGINE) if f.kind in ("igb", "edu")]
    if not cards:
        raise CapabilityMissing("a plain PCIe device (engine igb or edu) beside the window")
    return cards[0]


def _until_wanted(agent: Any, held: int, bdf: str, load: _Load) -> None:
    deadline_s = time.monotonic() + WANTED_TIMEOUT_S
    seed = 200
    while not agent.call("fabric.window_wanted", container=held, device=bdf, timeout_s=0.0)[
        "wanted"
    ]:
        if time.monotonic() > deadline_s:
            raise Refuted("who holds the window was not told that it is wanted back")
        load.write(seed)
        seed = 200 + (seed + 1) % 50


def _not_gone(rack: Rack, window: fabric.Window, observe: Observer) -> None:
    try:
        fabric.await_gone(rack, window, timeout_s=HELD_S)
    except HostError as error:
        observe.note(error.message)
        if window.node not in error.message or window.port not in error.message:
            raise Refuted(f"nobody is named: {error.message}") from error
    else:
        raise Refuted("the window went while someone held it")


def _found(
    place: Place, before: Mapping[str, Any], deadline_s: float
) -> tuple[str, Mapping[str, Any]]:
    """The new function, and its memory, once it has an address."""
    while time.monotonic() < deadline_s:
        for bdf, device in place.devices().items():
            for bar in device["bars"] if bdf not in before else ():
                if bar["index"] == VRAM_BAR and bar["address"]:
                    return bdf, bar
        time.sleep(_POLL_S)
    raise Refuted("the guest did not find the window, or had no room for it")


def _ns(began_s: float) -> int:
    return int((time.monotonic() - began_s) * 1e9)
