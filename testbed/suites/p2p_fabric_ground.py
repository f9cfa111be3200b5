# SPDX-License-Identifier: Apache-2.0
"""GPU models that share a scale-up fabric, ready for a suite: fixtures ``between`` and ``within``.

A *way* has an initiator and an owner of memory: of two nodes (``between``), or of one (``within``).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from testbed.errors import AgentError, CapabilityMissing, TestbedError
from testbed.harness.racks import LiveRack
from testbed.instruments.bench import Bench
from testbed.instruments.interface import Rack
from testbed.instruments.model_devices import ModelGpu
from testbed.instruments.mutations import Mutation
from testbed.instruments.protocol_events import ProtocolEvents
from testbed.results.evidence import Note
from testbed.results.judging import Judgement
from testbed.suites.fabric_ways import FABRIC, Member, Way
from testbed.topology.plan import RackPlan, Role

KIND = "ual"
NEEDED = "two GPUs with `engine: model`, joined by a link of `kind: ual`"
FIRST_VIRTUAL = 1 << 40  # in the initiator's own address space


class Fabric:
    """All of a rack's GPU models that have a link of kind ``ual``, opened and joined."""

    def __init__(self, rack: Rack) -> None:
        self._links = [
            link.between
            for link in rack.topology.links
            if link.kind == KIND and all(_is_model(rack, end) for end in link.between)
        ]
        names = list(dict.fromkeys(end for ends in self._links for end in ends))
        self._rack = rack
        self._identities = {name: number for number, name in enumerate(names, 1)}
        self._windows = count(FIRST_VIRTUAL, 1 << 30)
        self.members: dict[str, Member] = {}
        self._benches: dict[str, Bench] = {}
        self._events: dict[str, ProtocolEvents] = {}
        self._title = ""
        for node in dict.fromkeys(name.partition("/")[0] for name in names):
            self.open(node)

    def open(self, node: str) -> None:
        """Open a node's devices, and have its GPUs join; again after it was started anew."""
        machine = self._rack.nodes[node]
        ours = {name.partition("/")[2] for name in self._identities if name.startswith(f"{node}/")}
        roles = machine.plan.by_role(Role.VRAM, Role.ENGINE)
        devices = [function for function in roles if function.device in ours]
        bench = self._benches[node] = Bench.open(machine, devices)
        machine.agent.call("fabric.begin", title=self._title)
        self._events[node] = ProtocolEvents(self._rack, node, "fabric")
        for name, identity in self._identities.items():
            if name.partition("/")[0] != node:
                continue
            gpu = ModelGpu(bench, name.partition("/")[2])
            member = self.members[name] = Member(name, identity, gpu)
            member.call(
                "join",
                fabric=FABRIC,
                device=name,
                identity=identity,
                video_bytes=gpu.vram.size_bytes,
                peers=list(self._peers(name)),
            )

    def way(self, *, same_os: bool) -> Way:
        """The first initiator and owner. :raises CapabilityMissing: there is no such link."""
        for one, other in self._links:
            if (one.partition("/")[0] == other.partition("/")[0]) is same_os:
                links = self._number(one, other), self._number(other, one)
                return Way(self.members[one], self.members[other], links, self._windows)
        where = "of one node" if same_os else "of two nodes"
        raise CapabilityMissing(f"{NEEDED}, {where}")

    def joined(self, one: str, other: str) -> bool:
        """Whether a link of the fabric has these two ends."""
        return any({one, other} == set(ends) for ends in self._links)

    def backwards(self, way: Way) -> Way:
        """The same link, used by the other one."""
        links = (way.links[1], way.links[0])
        turned = Way(way.owner, way.initiator, links, self._windows)
        turned.mutation = way.mutation
        return turned

    def bench(self, node: str) -> Bench:
        """A node's devices."""
        return self._benches[node]

    def begin(self, title: str) -> None:
        """What the agents note from now on is part of a test."""
        self._title = title
        for node in self._events:
            self._rack.nodes[node].agent.call("fabric.chapter", title=title)

    def keep_events(self) -> None:
        """What the nodes that live have noted; before one is ended, or what it noted is lost."""
        for node, events in self._events.items():
            if self._rack.nodes[node].alive:
                events.keep()

    def close(self) -> None:
        """Give the devices back."""
        for bench in self._benches.values():
            bench.close()

    def _number(self, name: str, peer: str) -> int:
        return int(next(each["link"] for each in self._peers(name) if each["name"] == peer))

    def _peers(self, name: str) -> Iterator[dict[str, Any]]:
        # A GPU numbers its links as the topology has them, of whatever kind they are.
        links = [
            link.between
            for link in self._rack.topology.links
            if name in link.between and all(_is_model(self._rack, end) for end in link.between)
        ]
        for number, ends in enumerate(links):
            peer = ends[1] if ends[0] == name else ends[0]
            if ends in self._links:
                yield {
                    "name": peer,
                    "identity": self._identities[peer],
                    "link": number,
                    "same_os": peer.partition("/")[0] == name.partition("/")[0],
                }


def has_fabric(plan: RackPlan) -> bool:
    """Whether any test on a fabric will get as far as its rack."""
    return any(link.kind == KIND for link in plan.topology.links)


def the_fabric(rack: LiveRack) -> Fabric:
    """The fabric of the rack under test, made once for each machine."""
    if not any(link.kind == KIND for link in rack.topology.links):
        raise CapabilityMissing(f"this rack lacks {NEEDED}")
    return rack.once("fabric", Fabric, Fabric.close, holds="fabric")


@pytest.fixture(autouse=True, scope="session")
def give_back(rack: LiveRack) -> Iterator[None]:
    """At the end the devices go back to their drivers, in a rack that lives on."""
    yield
    if rack.is_running and not rack.ours:
        rack.drop_all()


@pytest.fixture
def fabric(rack: LiveRack, request: pytest.FixtureRequest) -> Iterator[Fabric]:
    """The fabric, whose agents note what a test does; at its end that is kept."""
    made = the_fabric(rack)
    made.begin(request.node.name.removeprefix("test_"))
    yield made
    if rack.is_running and not rack.is_dead:
        made.keep_events()


@pytest.fixture
def between(fabric: Fabric, rack: LiveRack, mutation: Mutation) -> Iterator[Way]:
    """GPUs of two nodes: of two operating systems."""
    yield from _way(fabric, rack, mutation, same_os=False)


@pytest.fixture
def within(fabric: Fabric, rack: LiveRack, mutation: Mutation) -> Iterator[Way]:
    """GPUs of one operating system."""
    yield from _way(fabric, rack, mutation, same_os=True)


def refusal(call: Any, *args: Any, **params: Any) -> tuple[str, int | None, str]:
    """The error that a call ends in: its class in the guest, errno and message; "" if in none."""
    try:
        call(*args, **params)
    except AgentError as error:
        return error.remote_type, error.errno, error.message
    return "", None, "it was not refused"


def judge_refusal(
    what: str, got: tuple[str, int | None, str], kind: str, words: str = "", code: int | None = None
) -> Judgement:
    """Was it refused with an error of that class, with these words, and that errno?"""
    said = f"{what}: {got[0] or 'success'} ({got[2]})"
    holds = got[0] == kind and words in got[2] and (code is None or got[1] == code)
    return Judgement(holds, said, (Note(said),))


def _way(fabric: Fabric, rack: LiveRack, mutation: Mutation, *, same_os: bool) -> Iterator[Way]:
    way = fabric.way(same_os=same_os)
    way.mutation = mutation
    try:
        yield way
    finally:
        if rack.is_running and not rack.is_dead:
            try:
                way.close()
            except TestbedError:
                rack.drop("fabric")
                raise


def _is_model(rack: Rack, end: str) -> bool:
    node, _, device = end.partition("/")
    return any(f.kind == "model" for f in rack.plan.nodes[node].of_device(device))
