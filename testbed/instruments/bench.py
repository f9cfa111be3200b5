# SPDX-License-Identifier: Apache-2.0
"""A node's devices, opened for a suite: memories, engines, mappings and the fault watch.

One bench is one VFIO container (through the IOMMU) or, for :meth:`Bench.open_raw`, the same devices
without any (their bus addresses are what they are given). Opening costs a third of a second in an
emulated machine, so that a module shares one and cleans it between tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.errors import TestbedError
from testbed.instruments.faults import FaultWatch, watch_machine
from testbed.instruments.interface import RackNode
from testbed.instruments.mapper import Mapper
from testbed.instruments.memory import VRAM_BAR, Memory
from testbed.instruments.mutations import Mutation
from testbed.instruments.paths import DeviceWitness, PathWatch
from testbed.results.evidence import Access, Counter, Evidence
from testbed.results.judging import Judgement, all_of, judge_no_fault
from testbed.topology.plan import Function, Role

DOORBELL_BAR = 0  # edu: BAR0 is its registers (QEMU docs/specs/edu.rst)
SCRATCH_BYTES = 64 << 10
COPY_TIMEOUT_S = 5.0
CLAIM = "device says copied"


@dataclass(frozen=True)
class CopyStatus:
    """What a device says of a copy; never evidence that bytes arrived."""

    completed: bool
    copied_bytes: int
    elapsed_ns: int

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """For the outcome."""
        return (
            Counter(CLAIM, self.copied_bytes if self.completed else 0, "bytes"),
            Counter("copy time in the guest", self.elapsed_ns, "ns"),
        )


class Engine:
    """One device that does DMA."""

    def __init__(self, node: RackNode, function: Function, number: int) -> None:
        self._agent = node.agent
        self._number = number
        self.function = function
        self.requester = function.bdf
        self.witness = DeviceWitness.of(node, function)

    @property
    def number(self) -> int:
        """The agent's, for its other methods."""
        return self._number

    @property
    def bulk_bytes(self) -> int:
        """A copy that takes a fraction of a second: edu needs 0.2 s for each 4 KiB."""
        return 4096 if self.function.kind == "edu" else 64 << 10

    def copy(self, source_iova: int, target_iova: int, size_bytes: int) -> CopyStatus:
        """Copy by bus address and wait; a copy that never ends is ``completed=False``."""
        answer = self._agent.call(
            "engine.copy",
            engine=self._number,
            source_iova=source_iova,
            target_iova=target_iova,
            size_bytes=size_bytes,
            timeout_s=COPY_TIMEOUT_S,
        )
        return self._status(answer)

    def write32(self, iova: int, value: int) -> CopyStatus:
        """Write four bytes by bus address: ring a doorbell."""
        return self._status(
            self._agent.call("engine.write32", engine=self._number, iova=iova, value=value)
        )

    def storm(self, iova: int, count: int, access: Access) -> CopyStatus:
        """One DMA to each of ``count`` pages, as fast as the device can."""
        return self._status(
            self._agent.call(
                "engine.storm", engine=self._number, iova=iova, count=count, access=access
            )
        )

    @staticmethod
    def _status(answer: Mapping[str, Any]) -> CopyStatus:
        return CopyStatus(answer["completed"], answer["copied_bytes"], answer["elapsed_ns"])


class Bench:
    """See the module. ``mapper`` is None for a raw bench."""

    def __init__(
        self,
        node: RackNode,
        container: int,
        tree: Sequence[Mapping[str, Any]],
        *,
        mapper: Mapper | None,
        mutation: Mutation,
        machine_watched: bool,
    ) -> None:
        self.node = node
        self.mutation = mutation
        self._container = container
        self._mapper = mapper
        self._machine_watched = machine_watched
        self._tree = {device["bdf"]: device for device in tree}
        self._engines: dict[str, Engine] = {}
        self._buffers: dict[str, Memory] = {}

    @classmethod
    def open(
        cls,
        node: RackNode,
        functions: Iterable[Function],
        mutation: Mutation = Mutation.NONE,
        *,
        tree: Sequence[Mapping[str, Any]] | None = None,
    ) -> Bench:
        """Hand the devices to VFIO, in one container.

        :param tree: the agent's ``pci.tree`` or ``pci.bars``, if it is at hand.
        """
        if tree is None:
            tree = node.agent.call("pci.bars")["devices"]
        opened = node.agent.call("vfio.open", devices=_unique(functions))
        bars = [
            (bar["address"], bar["size_bytes"])
            for device in tree
            for bar in device["bars"]
            if bar["kind"] == "mem"
        ]
        mapper = Mapper(node.agent, opened["container"], bars, mutation)
        bench = cls(
            node,
            opened["container"],
            tree,
            mapper=mapper,
            mutation=mutation,
            machine_watched=watch_machine(node),
        )
        if mutation is Mutation.MAP_HOLES:
            mapper.use_for_holes(bench.buffer("spare", 64 << 10))
        return bench

    @classmethod
    def open_raw(cls, node: RackNode, functions: Iterable[Function]) -> Bench:
        """The devices as they are, through their sysfs resources: no VFIO, no mappings."""
        tree = node.agent.call("pci.bars")["devices"]
        opened = node.agent.call("raw.open", devices=_unique(functions))
        return cls(
            node,
            opened["container"],
            tree,
            mapper=None,
            mutation=Mutation.NONE,
            machine_watched=watch_machine(node),
        )

    @property
    def container(self) -> int:
        """The agent's number of the container."""
        return self._container

    @property
    def mapper(self) -> Mapper:
        """The container's mappings."""
        if self._mapper is None:
            raise TestbedError("a raw bench has no mappings")
        return self._mapper

    def vram(self, function: Function) -> Memory:
        """A GPU's video memory."""
        return self._bar(function, VRAM_BAR, host_view=function.name)

    def registers(self, function: Function) -> Memory:
        """The registers that begin with the doorbell page."""
        return self.bar(function, DOORBELL_BAR)

    def bar(self, function: Function, index: int) -> Memory:
        """Any of its BARs, as the guest sees it."""
        return self._bar(function, index)

    def buffer(self, name: str, size_bytes: int) -> Memory:
        """Guest memory of that name, allocated once."""
        if name not in self._buffers:
            answer = self.node.agent.call("memory.alloc", name=name, size_bytes=size_bytes)
            self._buffers[name] = Memory(
                self.node, name, size_bytes, {"ram": name}, bus_address=answer["physical"]
            )
        return self._buffers[name]

    def engine(self, function: Function, scratch: Memory | None = None) -> Engine:
        """The device's driver, started when first asked for.

        Its rings are in guest memory, mapped for it; without mappings in the last part of
        ``scratch``, a BAR, which unlike guest memory is contiguous for the device.
        """
        if function.bdf not in self._engines:
            if self._mapper is not None:
                memory = self.buffer(f"scratch-{function.qemu_id}", SCRATCH_BYTES)
                mapping = self._mapper.map(memory)
                self._mapper.keep(mapping)
                iova, offset = mapping.iova, 0
            elif scratch is not None and scratch.bus_address is not None:
                memory, offset = scratch, scratch.size_bytes - SCRATCH_BYTES
                iova = scratch.bus_address + offset
            else:
                raise TestbedError("an engine without mappings needs scratch in a BAR")
            handle = self.node.agent.call(
                "engine.open",
                device=function.bdf,
                kind=function.kind,
                scratch={
                    "iova": iova,
                    "target": memory.target,
                    "offset": offset,
                    "size_bytes": SCRATCH_BYTES,
                },
            )
            self._engines[function.bdf] = Engine(self.node, function, handle["engine"])
        return self._engines[function.bdf]

    def watch(self) -> FaultWatch:
        """Watch for faults while a ``with`` block runs."""
        return FaultWatch(self.node, machine_watched=self._machine_watched)

    def deliver(
        self,
        engine: Engine,
        source_iova: int,
        target_iova: int,
        *,
        into: Memory,
        offset: int,
        expected: bytes,
        path: str | None = "iommu",
    ) -> Judgement:
        """Copy, and judge at the destination: the expected bytes are there, nothing faulted, and
        a device that keeps count of its paths moved them by ``path`` (None: by whichever).

        The device's own status is kept as evidence and decides nothing; only the mutation
        ``trust-status`` believes it.
        """
        with self.watch() as watch, PathWatch(engine.witness) as paths:
            status = engine.copy(source_iova, target_iova, len(expected))
        arrived = into.judge(offset, expected)
        went = paths.judge(path, len(expected))
        judgement = all_of(judge_no_fault(watch.window), arrived, went)
        if self.mutation is Mutation.TRUST_STATUS:
            judgement = Judgement(status.completed, "the device says so")
        return Judgement(judgement.holds, judgement.reason, (*judgement.evidence, *status.evidence))

    def clean(self) -> None:
        """Take away every mapping but the engines' own."""
        if self._mapper is not None:
            self._mapper.release()

    def close(self) -> None:
        """Stop the engines and give the devices back; AgentError if the guest could not."""
        self.node.agent.call("vfio.close", container=self._container)
        for name in self._buffers:
            self.node.agent.call("memory.free", name=name)

    def _bar(self, function: Function, index: int, host_view: str = "") -> Memory:
        bar = self._bar_of(function, index)
        return Memory(
            self.node,
            function.name,
            bar["size_bytes"],
            {"bar": function.bdf, "index": index},
            bus_address=bar["address"],
            host_view=host_view,
        )

    def _bar_of(self, function: Function, index: int) -> Mapping[str, Any]:
        device = self._tree.get(function.bdf)
        if device is None:
            raise TestbedError(f"{function.name} is not at {function.bdf}, where it was placed")
        for bar in device["bars"]:
            if bar["index"] == index:
                return bar  # type: ignore[no-any-return]
        raise TestbedError(f"{function.name} at {function.bdf} has no BAR{index}")


def dma_functions(functions: Iterable[Function]) -> list[Function]:
    """Those that a bench can open: video memories, engines and doorbells."""
    roles = (Role.VRAM, Role.ENGINE, Role.DOORBELL)
    return [function for function in functions if function.role in roles]


def _unique(functions: Iterable[Function]) -> list[str]:
    return list(dict.fromkeys(function.bdf for function in functions))
