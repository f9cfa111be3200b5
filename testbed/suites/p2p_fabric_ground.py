# SPDX-License-Identifier: Apache-2.0
"""GPU models that share a scale-up fabric, ready for a suite: fixtures ``between`` and ``within``.

A *way* has an initiator and an owner of memory: of two nodes (``between``), or of one (``within``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

from testbed.errors import AgentError, CapabilityMissing, TestbedError
from testbed.harness.racks import LiveRack
from testbed.instruments.bench import Bench
from testbed.instruments.interface import Rack
from testbed.instruments.model_devices import DRIVER_BYTES, ModelGpu, copy, place
from testbed.instruments.mutations import Mutation
from testbed.instruments.paths import PathWatch
from testbed.instruments.protocol_events import ProtocolEvents
from testbed.results.evidence import Note
from testbed.results.judging import PAGE_BYTES, Judgement, all_of
from testbed.topology.plan import RackPlan, Role

FABRIC = "ual0"
TARGET = 4 << 20  # where tests write, in the owner's memory
KIND = "ual"
NEEDED = "two GPUs with `engine: model`, joined by a link of `kind: ual`"
FIRST_VIRTUAL = 1 << 40  # in the initiator's own address space
ADDRESS_BITS = 51  # of a fabric address in a page table entry, below the route bit
_TOLD_TIMEOUT_S = 5.0
_POLL_S = 0.01

Address = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A GPU on the fabric, which its agent has joined. ``name`` as in the topology's links."""

    name: str
    identity: int
    gpu: ModelGpu

    @property
    def node(self) -> str:
        """Whose it is."""
        return self.name.partition("/")[0]

    @property
    def free_bytes(self) -> int:
        """Of its video memory, what is not its driver's."""
        return self.gpu.vram.size_bytes - DRIVER_BYTES

    def call(self, method: str, **params: Any) -> Any:
        """One of the agent's methods ``fabric.*`` about this GPU."""
        agent = self.gpu.bench.node.agent
        return agent.call(f"fabric.{method}", engine=self.gpu.engine.number, **params)

    def submit(self, *commands: dict[str, Any]) -> dict[str, Any]:
        """As ``gpu.submit``, and the agent notes it."""
        answer: dict[str, Any] = self.call("submit", commands=list(commands))
        return answer

    def refusals(self) -> int:
        """How often its model has refused an access, or was refused one."""
        return int(self.gpu.model("counters")["events"]["access_errors"])


class State:
    """Fabric addresses that the owner gave out, by the calls of the UAL API."""

    def __init__(
        self, owner: Member, answer: dict[str, Any], mutation: Mutation = Mutation.NONE
    ) -> None:
        self._mutation = mutation
        self._agent = owner.gpu.bench.node.agent
        self._number = int(answer["state"])
        self.mode = str(answer["mode"])
        self.iova_ranges = int(answer["iova_ranges"])
        self._links: dict[int, int] = {}
        self._exposed_bytes = 0
        self.is_open = True

    def _call(self, method: str, **params: Any) -> Any:
        return self._agent.call(f"fabric.{method}", state=self._number, **params)

    def expose(self, size_bytes: int) -> None:
        """Break it: all of it leads to the owner's memory from now on, whatever is asked for."""
        self._call("link", physical=TARGET, size_bytes=size_bytes, offset=0)
        self._call("sync", offset=0, size_bytes=size_bytes)
        self._exposed_bytes = size_bytes

    def link(self, physical: int, size_bytes: int, offset: int = 0, **more: bool) -> None:
        """Let ``offset`` lead to the owner's memory at ``physical``."""
        if self._exposed_bytes:
            return
        self._call("link", physical=physical, size_bytes=size_bytes, offset=offset, **more)
        self._links[offset] = size_bytes
        if self._mutation is Mutation.FABRIC_EARLY_SYNC:
            self.sync(offset, size_bytes)

    def sync(self, offset: int, size_bytes: int) -> None:
        """Make links visible."""
        self._call("sync", offset=offset, size_bytes=size_bytes)

    def unlink(self, offset: int) -> None:
        """Undo one link."""
        if self._mutation is not Mutation.FABRIC_SKIP_UNLINK and not self._exposed_bytes:
            self._unlink(offset)

    def _unlink(self, offset: int) -> None:
        self._call("unlink", offset=offset, size_bytes=self._links[offset])
        del self._links[offset]

    def address(self, offset: int = 0) -> tuple[Address, int | None]:
        """The address for the initiator; a physical one's page table entry too."""
        answer = self._call("address", offset=offset)
        return answer["address"], answer["entry"]

    def free(self) -> None:
        """Give the addresses back."""
        if self._exposed_bytes:
            self._call("unlink", offset=0, size_bytes=self._exposed_bytes)
        self._call("free")
        self.is_open = False

    def destroy(self, mapped_bytes: int) -> None:
        """Undo all links, and give the addresses back."""
        self._call("destroy", mapped_bytes=self._exposed_bytes or mapped_bytes)
        self.is_open = False
        self._links.clear()

    def drop(self) -> None:
        """Whatever is left of it."""
        if self.is_open:
            for offset in list(self._links):
                self._unlink(offset)
            self.free()


class Way:
    """An initiator, an owner, and what a test has taken, which :meth:`close` gives back."""

    def __init__(
        self, initiator: Member, owner: Member, links: tuple[int, int], windows: Iterator[int]
    ) -> None:
        """``links`` are the two ends' numbers of the link, ``windows`` free virtual addresses."""
        self.initiator = initiator
        self.owner = owner
        self.links = links
        self._windows = windows
        self.mutation = Mutation.NONE
        self._states: list[State] = []
        self._mapped: list[tuple[int, int]] = []

    def alloc(
        self, size_bytes: int, *, virtual: bool | None = None, context: Sequence[str] = ()
    ) -> State:
        """``ual_iova_alloc`` by the owner, for the initiator."""
        match self.mutation:
            case Mutation.FABRIC_MAP_PHYSICAL if virtual is False:
                virtual = True
            case Mutation.FABRIC_ALWAYS_VIRTUAL if virtual is None:
                virtual = True
            case Mutation.FABRIC_ANY_CONTEXT:
                context = ()
            case _:
                pass
        mode = {} if virtual is None else {"virtual": virtual}
        answer = self.owner.call(
            "alloc", peer=self.initiator.name, size_bytes=size_bytes, context=list(context), **mode
        )
        self._states.append(State(self.owner, answer, self.mutation))
        if self.mutation is Mutation.FABRIC_EXPORT_ALL and answer["mode"] == "virtual":
            self._states[-1].expose(size_bytes)
        return self._states[-1]

    def map(self, address: Address, size_bytes: int) -> int:
        """Have the initiator's page tables lead there; answers its virtual address."""
        virtual = next(self._windows)
        if self.mutation is Mutation.FABRIC_ANY_ADDRESS:
            value = address["value"] & (1 << ADDRESS_BITS) - 1
            right = {"kind": "fabric", "user": self.initiator.name, "fabric": FABRIC}
            address = {"physical": False, **address, **right, "value": value}
        self.initiator.call(
            "map", owner=self.owner.name, address=address, virtual=virtual, size_bytes=size_bytes
        )
        self._mapped.append((virtual, size_bytes))
        return virtual

    def write(self, virtual: int, size_bytes: int) -> dict[str, Any]:
        """The initiator copies from the start of its own memory."""
        return self.initiator.submit(copy(place("vram", 0), place("virtual", virtual), size_bytes))

    def deliver(self, virtual: int, physical: int, seed: int, size_bytes: int) -> Judgement:
        """The initiator writes; the owner's guest and the host see the bytes, and they went by the
        link, with no mapping of an IOMMU made or used for them.
        """
        gpu, witness = self.initiator.gpu, self.initiator.gpu.witness
        expected = gpu.vram.fill(0, size_bytes, seed)
        maps = [_maps(member) for member in (self.initiator, self.owner)]
        with gpu.bench.watch() as watch, PathWatch(witness) as paths:
            answer = self.write(virtual, size_bytes)
        holds = bool(answer["completed"]) and not watch.window.records
        ended = Judgement(holds, f"the write ended with {answer['status'] or 'a fault'}")
        arrived = self.owner.gpu.vram.judge(physical, expected)
        same = maps == [_maps(member) for member in (self.initiator, self.owner)]
        translated = Judgement(same, "an IOMMU mapping was made meanwhile" if not same else "")
        return all_of(ended, translated, arrived, paths.judge("link", size_bytes))

    def fetch(self, virtual: int, physical: int, seed: int, size_bytes: int) -> Judgement:
        """The initiator reads what the owner's guest has written."""
        expected = self.owner.gpu.vram.fill(physical, size_bytes, seed)
        answer = self.initiator.submit(
            copy(place("virtual", virtual), place("vram", 0), size_bytes)
        )
        ended = Judgement(bool(answer["completed"]), f"the read ended with {answer['status']}")
        return all_of(ended, self.initiator.gpu.vram.judge(0, expected))

    def refused(self, virtual: int, at: int, cause: str = "link_refused") -> Judgement:
        """A write there fails with that cause, at the address ``at`` of the link; the owner's model
        says whose it was, and its memory is as before.
        """
        before = self._all_of_it()
        told = "the link is down"
        seen = self.owner.gpu.model("trace") if cause == "link_refused" else []
        last = seen[-1]["sequence"] if seen else 0
        refusals = self.initiator.refusals()
        answer = self.write(virtual, PAGE_BYTES)
        wanted = {"cause": cause, "address": at}
        if answer["status"] != wanted:
            said = answer["status"] or "success"
            return Judgement(False, f"a write to {at:#x} of the link ended with {said}")
        if self.initiator.refusals() <= refusals:
            return Judgement(False, "the initiator has not counted the refusal")
        if cause == "link_refused":
            told = self._told(last, at)
        if not told:
            return Judgement(False, f"the owner was not told of the write by {self.initiator.name}")
        if self._all_of_it() != before:
            return Judgement(False, f"bytes of {self.owner.name} changed")
        said = f"a write to {at:#x} of the link: {cause}; {told}"
        return Judgement(True, said, (Note(said),))

    def _told(self, after: int, address: int) -> str:
        """The owner's line about an access of the initiator; "" if none comes in time."""
        deadline_s = time.monotonic() + _TOLD_TIMEOUT_S
        while time.monotonic() < deadline_s:
            for entry in self.owner.gpu.model("trace", after=after):
                is_it = entry["what"] == "access_errors" and entry["address"] == address
                if is_it and self.initiator.name in entry["outcome"]:
                    return f"{self.owner.name}: {entry['outcome']}"
            time.sleep(_POLL_S)
        return ""

    def _all_of_it(self) -> bytes:
        """The owner's memory without its driver's part, which changes."""
        return self.owner.gpu.vram.read(0, self.owner.free_bytes)

    def close(self) -> None:
        """Give everything back."""
        for virtual, size_bytes in self._mapped:
            self.initiator.call("unmap", virtual=virtual, size_bytes=size_bytes)
        for state in self._states:
            state.drop()
        self._mapped.clear()
        self._states.clear()
        self.owner.call("close", peer=self.initiator.name)


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


def _maps(member: Member) -> int:
    maps: int = member.gpu.model("counters")["events"]["dma_maps"]
    return maps
