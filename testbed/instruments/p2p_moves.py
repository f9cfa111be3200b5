# SPDX-License-Identifier: Apache-2.0
"""Move a few bytes between two devices of a running rack, and see where they go.

An engine copies into a peer's video memory twice: to its raw bus address, for which its container
has no mapping, and to an IOVA that is mapped to it. A disk reads itself into a peer's memory, by
whatever address the kernel gives it. What was written over is put back.

The bytes decide whether something arrived; by which path, the model's own count of bytes says, or
QEMU's trace of translations. A device's word that it is done decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from guest_agent.pattern import pattern
from testbed.errors import AgentError, LostError, TestbedError
from testbed.instruments.bench import SCRATCH_BYTES, Bench, Engine
from testbed.instruments.faults import parse_trace
from testbed.instruments.kernel_p2p import Tree
from testbed.instruments.memory import PROVIDED_BYTES, Memory
from testbed.instruments.translations import TranslationWatch
from testbed.machine.command import QEMU_LOG
from testbed.rack_node import RackNode
from testbed.results.judging import PAGE_BYTES
from testbed.topology.matrix import (
    Arrival,
    Measured,
    Moves,
    Pair,
    Unknown,
    Way,
    has_containers,
)
from testbed.topology.peers import Peer
from testbed.topology.plan import Function, Role

Moved = dict[Pair, Measured | Unknown]

COPY_BYTES = 64  # the smallest copy that every engine can do
SOURCE_OFFSET = 0
TARGET_OFFSET = 256 << 10
DISK_BYTES = PAGE_BYTES
# Drivers that give a function up for a moment and get it back as it was.
_YIELDING = ("", "nvme", "igb", "vfio-pci")


def engine_moves(node: RackNode, ours: Sequence[Peer], tree: Tree) -> Moved:
    """Every engine of a node, to every GPU's memory; for all other pairs of engines, why not.

    :raises LostError: the machine or the link died.
    """
    engines = [peer for peer in ours if peer.copies]
    targets = [peer for peer in ours if peer.kind == "gpu"]
    moved: Moved = {}
    for one in ours:
        for other in ours:
            if one is not other and (why := _why_not(one, other)):
                moved[one.name, other.name] = Unknown(why)
    pairs = [(one, other) for one in engines for other in targets if one is not other]
    if not pairs:
        return moved
    try:
        with _Bench(node, engines, targets, tree) as bench:
            for one, other in pairs:
                moved[one.name, other.name] = bench.move(one, other)
    except LostError:
        raise
    except TestbedError as error:
        for one, other in pairs:
            moved.setdefault((one.name, other.name), Unknown(error.message))
    return moved


def _why_not(one: Peer, other: Peer) -> str:
    if one.kind in ("device", "passthrough"):
        return f"{one.name}: only a driver of its own can make it copy"
    if one.kind == "nvme" or other.kind == "gpu":
        return ""
    if other.kind == "nvme":
        return "a disk's memory is its driver's: only disks are told to write there"
    return other.lacks_memory


class _Bench:
    """A node's engines and video memories, opened; a ``with`` block gives them back."""

    def __init__(
        self, node: RackNode, engines: Sequence[Peer], targets: Sequence[Peer], tree: Tree
    ) -> None:
        self._node = node
        self._engines = engines
        self._targets = targets
        self._has_container = has_containers(node.spec.iommu)
        self._iovas: dict[str, int] = {}
        self._seed = 0
        _check_free(node, [*engines, *targets], tree, whole_groups=self._has_container)

    def __enter__(self) -> _Bench:
        functions = [peer.client for peer in self._engines]
        functions += [peer.provider for peer in self._targets if peer.provider]
        self._cleanup = ExitStack()
        with ExitStack() as stack:
            for peer in self._targets:
                stack.enter_context(_kept(self._node, peer.provider))
            opened = Bench.open if self._has_container else Bench.open_raw
            self._bench = opened(self._node, functions)
            stack.callback(self._close)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _close(self) -> None:
        if self._node.alive:
            self._bench.close()

    def move(self, one: Peer, other: Peer) -> Measured | Unknown:
        """Both ways, from one engine to one GPU's memory."""
        if other.provider is None:
            return Unknown(other.lacks_memory)
        target = self._bench.vram(other.provider)
        if target.bus_address is None:
            return Unknown(f"{other.name}: its bus address is not known")
        try:
            engine = self._bench.engine(one.client, scratch=target)
            source = self._source(one)
            moves = {
                Way.RAW: self._copy(engine, source, target, target.bus_address + TARGET_OFFSET)
            }
            if self._has_container:
                moves[Way.IOVA] = self._copy(engine, source, target, self._mapped(target))
        except AgentError as error:
            return Unknown(f"{one.name} cannot be told to copy: {error.message}")
        return Measured(moves)

    def _source(self, one: Peer) -> tuple[Memory, int]:
        """The engine's own memory, and the bus address of the bytes that it shall copy."""
        memory = (
            self._bench.vram(one.provider)
            if one.provider
            else self._bench.buffer(f"topo-{one.client.qemu_id}", PAGE_BYTES)
        )
        if self._has_container:
            return memory, self._mapped(memory, SOURCE_OFFSET)
        if memory.bus_address is None:
            raise TestbedError(f"{one.name}: the address of its buffer is not known")
        return memory, memory.bus_address + SOURCE_OFFSET

    def _mapped(self, memory: Memory, offset: int = TARGET_OFFSET) -> int:
        place = memory.place(offset)
        if place not in self._iovas:
            mapping = self._bench.mapper.map(memory, offset, PAGE_BYTES)
            self._iovas[place] = mapping.iova
        return self._iovas[place]

    def _copy(
        self, engine: Engine, source: tuple[Memory, int], target: Memory, address: int
    ) -> Arrival:
        self._seed += 1
        memory, source_address = source
        data = pattern(self._seed, 0, COPY_BYTES)
        if memory.host_view:
            _poke(self._node, memory.host_view, SOURCE_OFFSET, data)
        else:
            memory.fill(SOURCE_OFFSET, COPY_BYTES, self._seed)
        _poke(self._node, target.host_view, TARGET_OFFSET, bytes(COPY_BYTES))
        before = engine.witness.moved() if engine.witness else {}
        log = self._node.log_dir / QEMU_LOG
        log_start = log.stat().st_size
        status = engine.copy(source_address, address, COPY_BYTES)
        if target.read(TARGET_OFFSET, COPY_BYTES) == data:
            after = engine.witness.moved() if engine.witness else {}
            paths = [p for p, (_, n) in after.items() if n - before[p][1] >= COPY_BYTES]
            return self._arrival(paths)
        with log.open("rb") as lines:
            lines.seek(log_start)
            faults = parse_trace(lines.read().decode(errors="replace"))
        refused = any(fault.requester == engine.requester for fault in faults)
        if refused or not status.completed:
            return Arrival.REFUSED
        # QEMU's engines are not told of refusals, and only of Intel's IOMMU there is a trace.
        is_watched = engine.witness or self._node.spec.iommu.kind == "intel"
        return Arrival.LOST if is_watched else Arrival.ABSENT

    def _arrival(self, paths: Sequence[str]) -> Arrival:
        if "peer" in paths:
            return Arrival.PEER
        if "iommu" in paths or "message" in paths:
            return Arrival.IOMMU if self._has_container else Arrival.ROOT
        return Arrival.ARRIVED


def _check_free(node: RackNode, ours: Sequence[Peer], tree: Tree, *, whole_groups: bool) -> None:
    """:raises TestbedError: a function that is needed is in somebody's use."""
    needed = {f.bdf for peer in ours for f in (peer.client, peer.provider) if f}
    groups = {device["iommu_group"] for device in tree if device["bdf"] in needed}
    for device in tree:
        in_group = whole_groups and device["iommu_group"] in groups
        if device["header"] == "bridge" or not (device["bdf"] in needed or in_group):
            continue
        if device["driver"] not in _YIELDING:
            raise TestbedError(f"{device['bdf']} belongs to the driver {device['driver']}")
        if device["driver"] == "nvme" and _is_mounted(node):
            raise TestbedError("a disk of the same IOMMU group is mounted")


def _is_mounted(node: RackNode) -> bool:
    mounts = node.link.run("cat /proc/mounts /proc/swaps", timeout_s=10.0).stdout
    return b"/dev/nvme" in mounts


@contextmanager
def _kept(node: RackNode, provider: Function | None) -> Iterator[None]:
    """Video memory that is written over inside the block, and put back after it."""
    if provider is None:
        yield
        return
    scratch = provider.vram_size_bytes - SCRATCH_BYTES
    places = [
        (SOURCE_OFFSET, PAGE_BYTES),
        (TARGET_OFFSET, PAGE_BYTES),
        (scratch, SCRATCH_BYTES),
    ]
    with node.host_memory(provider.name) as view:
        saved = [(offset, bytes(view[offset : offset + size])) for offset, size in places]
    try:
        yield
    finally:
        if node.alive:
            for offset, data in saved:
                _poke(node, provider.name, offset, data)


def _poke(node: RackNode, name: str, offset: int, data: bytes) -> None:
    with node.host_memory(name) as view:
        view[offset : offset + len(data)] = data


# --- disks


@dataclass(frozen=True)
class DiskMoves:
    """A piece of a provider's peer-to-peer memory, and a buffer of ordinary memory."""

    node: RackNode
    name: str
    physical: int

    @classmethod
    @contextmanager
    def into(cls, node: RackNode, provider: Function) -> Iterator[DiskMoves]:
        """Memory of a provider, while the block lasts. AgentError: it has none to give."""
        memory, buffer = f"topo-{provider.qemu_id}", "topo-disk"
        call = node.agent.call
        with ExitStack() as stack:
            if provider.role is Role.VRAM:
                stack.enter_context(_pool_kept(node, provider))
            params: dict[str, Any] = {"provider": provider.bdf, "size_bytes": DISK_BYTES}
            answer = call("p2pmem.alloc", name=memory, **params)
            stack.callback(_free, node, memory)
            call("memory.alloc", name=buffer, size_bytes=DISK_BYTES)
            stack.callback(_free, node, buffer)
            yield cls(node, memory, answer["physical"])

    def move(self, disk: Function) -> Measured | Unknown:
        """Let a disk read its first page into the memory, and see how it came there."""
        call = self.node.agent.call
        try:
            plain = self._read(disk, "topo-disk")
            if plain["bytes"] != DISK_BYTES:
                return Unknown(f"{disk.name} cannot be read: {plain['error']}")
            expected = bytes.fromhex(self._content("topo-disk"))
            stale = bytes(byte ^ 0xFF for byte in expected)
            call("memory.write", target={"ram": self.name}, hex=stale.hex())
            with TranslationWatch(self.node) as watch:
                answer = self._read(disk, self.name)
            arrived = bytes.fromhex(self._content(self.name)) == expected
        except AgentError as error:
            return Unknown(f"{disk.name} cannot be told to read: {error.message}")
        return Measured(self._moves(disk, watch, answer, arrived))

    def _moves(
        self, disk: Function, watch: TranslationWatch, answer: Mapping[str, Any], arrived: bool
    ) -> Moves:
        if not arrived:
            return {Way.DISK: Arrival.REFUSED if answer["error"] else Arrival.LOST}
        seen = watch.into(disk.bdf, self.physical, DISK_BYTES)
        if not seen:  # nothing translates: QEMU's disk does not tell which way it took
            return {Way.DISK: Arrival.ARRIVED}
        # The router's windows stand at bus addresses: they are what a switch does by itself.
        is_routed = all(each.is_identity for each in seen)
        return {Way.DISK: Arrival.PEER if is_routed else Arrival.IOMMU}

    def _read(self, disk: Function, memory: str) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self.node.agent.call(
            "nvme.transfer", device=disk.bdf, target={"ram": memory}, size_bytes=DISK_BYTES
        )
        return answer

    def _content(self, memory: str) -> str:
        answer = self.node.agent.call("memory.read", target={"ram": memory}, size_bytes=DISK_BYTES)
        return str(answer["hex"])


def _free(node: RackNode, name: str) -> None:
    if node.alive:
        node.agent.call("memory.free", name=name)


@contextmanager
def _pool_kept(node: RackNode, provider: Function) -> Iterator[None]:
    """The video memory from which the kernel allocates; which page is its choice."""
    with node.host_memory(provider.name) as view:
        saved = bytes(view[:PROVIDED_BYTES])
    try:
        yield
    finally:
        if node.alive:
            _poke(node, provider.name, 0, saved)
