# SPDX-License-Identifier: Apache-2.0
"""Doing the steps on memory: buffers, mappings, patterns written and read back."""

from __future__ import annotations

from typing import Any

from guest_agent.pattern import pattern
from testbed.errors import CapabilityMissing
from testbed.instruments.bench import Bench
from testbed.instruments.mapper import Mapping
from testbed.instruments.memory import Memory, sha256
from testbed.instruments.storage import TRANSFER_BYTES, Disks, Provided
from testbed.reports import closed
from testbed.reports.holdings import Holdings
from testbed.reports.places import PlaceFound, find_place
from testbed.reports.seen import Seen
from testbed.reports.steps import Buffer, Checksum, Fill, Map, P2pMem, Pattern, Unmap
from testbed.results.evidence import Note, Witness
from testbed.results.judging import Judgement
from testbed.topology.plan import Role

DEFAULT_MAP_BYTES = 64 << 10


class MemoryActions:
    """The memories that a report's steps know by name, and what is mapped of them."""

    def __init__(self, held: Holdings) -> None:
        self._held = held
        self._buffers: dict[str, tuple[str, Memory]] = {}
        self._mapped: dict[str, tuple[Bench, Mapping]] = {}
        self._disks: dict[str, Disks] = {}
        self.provided: dict[str, Provided] = {}

    def disks_of(self, node: str) -> Disks:
        """A node's disks."""
        if node not in self._disks:
            self._disks[node] = Disks(self._held.node(node))
        return self._disks[node]

    def buffer(self, step: Buffer) -> Seen:
        """Memory of the guest."""
        node = self._held.node(step.node)
        answer = node.agent.call("memory.alloc", name=step.buffer, size_bytes=step.size_bytes)
        physical = answer["physical"]
        target = {"ram": step.buffer}
        memory = Memory(node, step.buffer, step.size_bytes, target, bus_address=physical)
        self._buffers[step.buffer] = (node.name, memory)
        return Seen({"bus_address": physical, "size": step.size_bytes})

    def p2pmem(self, step: P2pMem) -> Seen:
        """Controller memory of a disk, from the kernel."""
        node, functions = self._held.functions(step.provider)
        provided = Provided.of(self._held.node(node), functions[0])
        self.provided[step.name or provided.name] = provided
        return Seen({"bus_address": provided.physical, "size": TRANSFER_BYTES})

    def _place(self, word: str) -> PlaceFound:
        nodes = {name: node for name, (node, _) in self._buffers.items()}
        return find_place(self._held.rack.plan, word, nodes, self.provided)

    def _memory(self, place: PlaceFound) -> Memory:
        """A BAR or a buffer."""
        if place.function is None or place.bar is None:
            return self._buffers[place.name][1]
        bench = self._held.opened(place.node, place.function.device).bench
        if place.function.role is Role.VRAM:
            return bench.vram(place.function)
        return bench.bar(place.function, place.bar)

    def map(self, step: Map) -> Seen:
        """An address for the importer: mapped, or the bus address itself."""
        place = self._place(step.memory)
        memory = self._memory(place)
        if step.into is not None:
            node, functions = self._held.functions(step.into)
            opened = self._held.opened(node, functions[0].device)
        elif place.function is not None:
            opened = self._held.opened(place.node, place.function.device)
        else:
            opened = self._held.first_of(place.node)
        size_bytes = step.size_bytes or min(DEFAULT_MAP_BYTES, memory.size_bytes - step.offset)
        bus_address = None
        if memory.bus_address is not None:
            bus_address = memory.bus_address + step.offset
        values = {"bus_address": bus_address, "size": size_bytes}
        if step.raw or opened.is_raw:
            if bus_address is None:
                raise CapabilityMissing(f"the physical address of {memory.name}")
            note = Note(f"{memory.place(step.offset)} handed out as {bus_address:#x}, not mapped")
            return Seen({**values, "dma_address": bus_address}, evidence=(note,))
        mapped = opened.bench.mapper.map(
            memory, step.offset, size_bytes, read=step.read, write=step.write
        )
        if step.name:
            self._mapped[step.name] = (opened.bench, mapped)
        return Seen({**values, "dma_address": mapped.iova}, evidence=(mapped.evidence,))

    def unmap(self, step: Unmap) -> Seen:
        """Take a mapping away."""
        bench, mapped = self._mapped.pop(step.mapping)
        bench.mapper.unmap(mapped)
        return Seen()

    def pattern(self, step: Pattern) -> Seen:
        """The bytes of a pattern, for a call."""
        data = pattern(step.seed, 0, step.size_bytes)
        return Seen({**_pattern_values(step), "hex": data.hex()})

    def fill(self, step: Fill) -> Seen:
        """A pattern into a memory or onto a disk."""
        place = self._place(step.memory)
        if place.is_p2pmem:
            self.provided[place.name].fill(step.seed)
        elif place.is_disk and place.function is not None:
            self.disks_of(place.node).fill(place.function, step.seed)
        elif self._held.is_closed(place):
            data = pattern(step.seed, 0, step.size_bytes)
            closed.write(self._held.node(place.node), place, step.offset, data)
        else:
            self._memory(place).fill(step.offset, step.size_bytes, step.seed)
        return Seen(_pattern_values(step))

    def checksum(self, step: Checksum) -> Seen:
        """What every witness reads there."""
        place = self._place(step.memory)
        name = f"{step.memory}+{step.offset:#x}"
        nothing = bytes(step.size_bytes)
        if place.is_p2pmem:
            provided = self.provided[place.name]
            read = provided.judge(nothing)
            name = f"{provided.provider.name}.cmb"
        elif place.is_disk and place.function is not None:
            read = self.disks_of(place.node).judge(place.function, nothing)
        elif self._held.is_closed(place):
            read = closed.judge(self._held.node(place.node), place, step.offset, nothing)
        else:
            read = self._memory(place).judge(step.offset, nothing)
        guest, host = _digests(read)
        values = {"guest": guest, "host": host or "", "size": step.size_bytes}
        return Seen(values, size_bytes=step.size_bytes, place=name, guest=guest, host=host)


def _pattern_values(step: Fill | Pattern) -> dict[str, Any]:
    digest = sha256(pattern(step.seed, 0, step.size_bytes))
    return {"seed": step.seed, "size": step.size_bytes, "sha256": digest}


def _digests(read: Judgement) -> tuple[str, str | None]:
    """What the witnesses read, whatever was expected."""
    seen = {each.witness: each.sha256 for each in read.evidence if each.kind == "bytes"}
    return seen[Witness.GUEST], seen.get(Witness.HOST)
