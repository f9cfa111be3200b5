# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-fabric``, second part: links, nodes and GPUs that go away under their peers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from errno import EHOSTDOWN
from typing import Protocol, runtime_checkable

import pytest

from testbed.errors import CapabilityMissing, DeviceLost
from testbed.harness.racks import LiveRack
from testbed.instruments.model_devices import copy, place
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.machine.bells import bells_of
from testbed.results.evidence import Note
from testbed.results.judging import PAGE_BYTES, Judgement
from testbed.suites.fabric_ways import TARGET, Way
from testbed.suites.p2p_fabric_bells import open_bells, ring_all
from testbed.suites.p2p_fabric_forwarded import Host
from testbed.suites.p2p_fabric_ground import Fabric, has_fabric, judge_refusal, the_fabric

pytest_plugins = ["testbed.suites.p2p_fabric_ground"]
pytestmark = pytest.mark.boots(when=has_fabric)

LOAD_COPIES, LOAD_BYTES = 400, 4 << 20  # more than a second's, of a GPU of 16 MiB


@runtime_checkable
class Restartable(Protocol):
    """A rack whose nodes can be ended and booted again."""

    def kill(self, name: str) -> None:
        """Kill that node's QEMU."""

    def restart(self, name: str) -> None:
        """Boot that node again."""


class Mapped:
    """Of the owner's memory a page, or more, mapped by the initiator in virtual mode."""

    def __init__(self, way: Way, size_bytes: int = PAGE_BYTES) -> None:
        self.way = way
        state = way.alloc(size_bytes, virtual=True)
        state.link(TARGET, size_bytes)
        state.sync(0, size_bytes)
        address, _ = state.address()
        self.value = int(address["value"])
        self.virtual = way.map(address, size_bytes)

    def carries(self, seed: int) -> Judgement:
        """Bytes arrive."""
        return self.way.deliver(self.virtual, TARGET, seed, PAGE_BYTES)

    def told(self, state: str, by: str = "interrupt") -> Judgement:
        """The initiator's driver learns the link's state."""
        gpu, link = self.way.initiator.gpu, self.way.links[0]
        answer = gpu.call("link_wait", link=link, state=state, by=by, timeout_s=20.0)
        reached = bool(answer["reached"])
        told = "is told" if reached else "is not told"
        said = f"{self.way.initiator.name} {told} by {by} that the link is {state}"
        return Judgement(reached, said, (Note(said),))

    def faults(self) -> Judgement:
        """A write ends with an error, and at once."""
        return self.way.refused(self.virtual, self.value, "link_down")


@pytest.fixture
def restartable(rack: LiveRack, fabric: Fabric) -> Iterator[Restartable]:
    """The rack, if its nodes can be booted again; then its fabric is made anew."""
    fabric.way(same_os=False)
    running = rack.get()
    if not rack.ours or not isinstance(running, Restartable):
        raise CapabilityMissing("a rack whose nodes this process can boot again")
    yield running
    if rack.is_running and not rack.is_dead:
        rack.drop("fabric")


@pytest.mark.requirement("FAB-08")
def test_a_link_that_goes_down(between: Way, mutation: Mutation, observe: Observer) -> None:
    """Peers fault and are told; when it is back, what was mapped works, and can be remapped."""
    page = Mapped(between)
    observe.require(page.carries(50))
    owner = between.owner.gpu
    between.initiator.gpu.submit({"op": "nop"}, by="interrupt")  # interrupts are armed
    if mutation is not Mutation.FABRIC_STAY_UP:
        owner.model("link", peer=between.initiator.name, up=False)
    try:
        observe.require(page.told("down"))
        if not owner.call("link_wait", link=between.links[1], state="down")["reached"]:
            raise Refuted(f"{between.owner.name} does not see its link go down")
        observe.require(page.faults())
    finally:
        owner.model("link", peer=between.initiator.name, restore=True)
    observe.require(page.told("up"))
    observe.require(page.carries(51))
    observe.require(Mapped(between).carries(52))
    observe.conclude("down: told by interrupt, link_down; up again: carried, mapped anew")


@pytest.mark.requirement("FAB-08")
def test_a_link_goes_down_under_load(between: Way, mutation: Mutation, observe: Observer) -> None:
    """Copies under way end with link_down where they are, and at once; the rest is refused."""
    page = Mapped(between, LOAD_BYTES)
    owner, gpu = between.owner.gpu, between.initiator.gpu
    observe.require(page.carries(53))
    load = [copy(place("vram", 0), place("virtual", page.virtual), LOAD_BYTES)] * LOAD_COPIES
    batch = gpu.begin(*load)
    if mutation is not Mutation.FABRIC_STAY_UP:
        owner.model("link", peer=between.initiator.name, up=False)
    try:
        answer = gpu.call("wait", batch=batch, timeout_s=30.0)
        observe.note(f"{LOAD_COPIES} copies under way ended with {answer['status']}")
        if not answer["ended"] or (answer["status"] or {}).get("cause") != "link_down":
            raise Refuted(f"{LOAD_COPIES} copies under way ended with {answer}")
        observe.require(page.faults())
    finally:
        owner.model("link", peer=between.initiator.name, restore=True)
    observe.require(page.told("up", by="poll"))
    observe.require(page.carries(54))
    observe.conclude("copies under way ended with link_down; up again it carries")


@pytest.mark.requirement("FAB-08")
def test_a_node_that_dies(
    rack: LiveRack, restartable: Restartable, mutation: Mutation, observe: Observer
) -> None:
    """QEMU is killed: its peers fault, are told, live on, and use it again after its return."""
    fabric = the_fabric(rack)
    page = Mapped(fabric.way(same_os=False))
    observe.require(page.carries(60))
    page.way.initiator.gpu.submit({"op": "nop"}, by="interrupt")
    node = page.way.owner.node
    _ring(rack, mutation, observe)
    host = Host(rack, page.way)
    asked = host.ask()
    if mutation is not Mutation.FABRIC_STAY_UP:
        fabric.keep_events()
        restartable.kill(node)
    _lost(page, observe)
    host.answer(asked)  # for a node that is gone since it was asked for
    observe.require(judge_refusal("attach", host.refusal(), "AbortedError", node, EHOSTDOWN))
    _back(rack, restartable, fabric, page, observe)
    _ring(rack, mutation, observe)
    observe.conclude(f"{node} was killed and came back; its peer faulted, was told, mapped anew")


@pytest.mark.requirement("FAB-08")
def test_a_gpu_that_dies(
    rack: LiveRack, restartable: Restartable, mutation: Mutation, observe: Observer
) -> None:
    """A GPU's model is killed: its own node loses the device, its peers the link."""
    fabric = the_fabric(rack)
    page = Mapped(fabric.way(same_os=False))
    observe.require(page.carries(70))
    page.way.initiator.gpu.submit({"op": "nop"}, by="interrupt")
    owner = page.way.owner
    devices = rack.nodes[owner.node].models.call("devices")
    (pid,) = [each["pid"] for each in devices if each["device"] == owner.gpu.name]
    if mutation is not Mutation.FABRIC_STAY_UP:
        os.kill(pid, signal.SIGKILL)
    _lost(page, observe)
    try:
        owner.gpu.model("counters")
    except DeviceLost as error:
        observe.note(error.message)
    else:
        raise Refuted(f"the model of {owner.name} answers after its death")
    if not rack.nodes[owner.node].alive:
        raise Refuted(f"{owner.node} died with its GPU")
    _back(rack, restartable, fabric, page, observe)
    observe.conclude(
        f"{owner.name} was lost and came back; its peer faulted, was told, mapped anew"
    )


def _ring(rack: LiveRack, mutation: Mutation, observe: Observer) -> None:
    """All bells, if two nodes have some: before a node dies, and after its return."""
    if len({node for node, _ in bells_of(rack.plan)}) > 1:
        with ExitStack() as stack:
            ring_all(open_bells(rack, mutation, stack), observe)


def _lost(page: Mapped, observe: Observer) -> None:
    observe.require(page.told("down"))
    observe.require(page.faults())


def _back(
    rack: LiveRack, restartable: Restartable, fabric: Fabric, page: Mapped, observe: Observer
) -> None:
    """The owner's node boots again: nothing of before is exported; mapped anew, it is reached."""
    way = page.way
    fabric.keep_events()
    restartable.restart(way.owner.node)
    fabric.open(way.owner.node)
    observe.require(page.told("up", by="poll"))
    again = fabric.way(same_os=False)
    observe.require(again.refused(page.virtual, page.value))
    observe.require(Mapped(again).carries(61))
    if not all(node.alive for node in rack.nodes.values()):
        raise Refuted("a machine died")
