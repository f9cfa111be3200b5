# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-fabric``, second part: links, nodes and GPUs that go away under their peers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import pytest

from testbed.errors import CapabilityMissing, DeviceLost
from testbed.harness.racks import LiveRack
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.results.evidence import Note
from testbed.results.judging import PAGE_BYTES, Judgement
from testbed.suites.p2p_fabric import TARGET
from testbed.suites.p2p_fabric_ground import Fabric, Way, the_fabric

pytest_plugins = ["testbed.suites.p2p_fabric_ground"]


@runtime_checkable
class Restartable(Protocol):
    """A rack whose nodes can be ended and booted again."""

    def kill(self, name: str) -> None:
        """Kill that node's QEMU."""

    def restart(self, name: str) -> None:
        """Boot that node again."""


class Mapped:
    """A page of the owner's memory, mapped by the initiator in virtual mode."""

    def __init__(self, way: Way) -> None:
        self.way = way
        state = way.alloc(PAGE_BYTES, virtual=True)
        state.link(TARGET, PAGE_BYTES)
        state.sync(0, PAGE_BYTES)
        address, _ = state.address()
        self.value = int(address["value"])
        self.virtual = way.map(address, PAGE_BYTES)

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
def restartable(rack: LiveRack) -> Iterator[Restartable]:
    """The rack, if its nodes can be booted again; then its fabric is made anew."""
    the_fabric(rack).way(same_os=False)
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
def test_a_node_that_dies(
    rack: LiveRack, restartable: Restartable, mutation: Mutation, observe: Observer
) -> None:
    """QEMU is killed: its peers fault, are told, live on, and use it again after its return."""
    fabric = the_fabric(rack)
    page = Mapped(fabric.way(same_os=False))
    observe.require(page.carries(60))
    page.way.initiator.gpu.submit({"op": "nop"}, by="interrupt")
    node = page.way.owner.node
    if mutation is not Mutation.FABRIC_STAY_UP:
        restartable.kill(node)
    _lost(page, observe)
    _back(rack, restartable, fabric, page, observe)
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


def _lost(page: Mapped, observe: Observer) -> None:
    observe.require(page.told("down"))
    observe.require(page.faults())


def _back(
    rack: LiveRack, restartable: Restartable, fabric: Fabric, page: Mapped, observe: Observer
) -> None:
    """The owner's node boots again: nothing of before is exported; mapped anew, it is reached."""
    way = page.way
    restartable.restart(way.owner.node)
    fabric.open(way.owner.node)
    observe.require(page.told("up", by="poll"))
    again = fabric.way(same_os=False)
    observe.require(again.refused(page.virtual, page.value))
    observe.require(Mapped(again).carries(61))
    if not all(node.alive for node in rack.nodes.values()):
        raise Refuted("a machine died")
