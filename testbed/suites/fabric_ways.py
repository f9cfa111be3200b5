# SPDX-License-Identifier: Apache-2.0
"""A way over a scale-up fabric: one GPU model reaches into another one's memory.

Its owner gives out addresses (a *state*), the initiator maps them, and what it then writes or reads
is judged at both ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.instruments.model_devices import DRIVER_BYTES, ModelGpu, copy, place
from testbed.instruments.mutations import Mutation
from testbed.instruments.paths import PathWatch
from testbed.results.evidence import Note
from testbed.results.judging import PAGE_BYTES, Judgement, all_of

FABRIC = "ual0"
TARGET = 4 << 20  # where tests write, in the owner's memory
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


def _maps(member: Member) -> int:
    maps: int = member.gpu.model("counters")["events"]["dma_maps"]
    return maps
