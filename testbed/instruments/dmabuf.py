# SPDX-License-Identifier: Apache-2.0
"""dma-bufs in a guest: exported from one device's video memory, imported by another device.

The guest's modules ``dmabuf_exporter`` and ``dmabuf_importer`` (guest_agent/kmod) do what they are
told; what the kernel answered to each step is an ``errno``. Bytes are judged in the video memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from errno import EOPNOTSUPP, errorcode
from itertools import count
from typing import Any

from guest_agent.pattern import pattern
from testbed.instruments.bench import CLAIM
from testbed.instruments.cases import route_between
from testbed.instruments.dmabuf_breaks import Break, break_of
from testbed.instruments.faults import FaultWatch
from testbed.instruments.interface import RackNode
from testbed.instruments.memory import VRAM_BAR, judge_video_page, sha256
from testbed.instruments.mutations import Mutation
from testbed.instruments.paths import DeviceWitness, PathWatch
from testbed.instruments.reasons import reasons_of
from testbed.instruments.translations import TranslationWatch
from testbed.results.evidence import Access, Counter, Evidence, Note
from testbed.results.judging import (
    PAGE_BYTES,
    Judgement,
    all_of,
    judge_bytes,
    judge_fault,
    judge_no_fault,
)
from testbed.topology.machine import Iommu
from testbed.topology.oracle import Route
from testbed.topology.plan import Function, RackPlan, Role

EXPORTER, IMPORTER = "dmabuf_exporter", "dmabuf_importer"
BUFFER_BYTES = 4 * PAGE_BYTES
BUFFER_OFFSET = 64 << 10  # in the BAR; of pages the kernel chooses it

# How importers behave: the words of the importer module.
STATIC: tuple[str, ...] = ()
DYNAMIC = ("dynamic",)
PEER = ("dynamic", "peer2peer")
REVOCABLE = (*PEER, "revocable")
PINNED = (*PEER, "pinned")
ON_DEMAND = (*REVOCABLE, "ondemand")

STALE, WRITTEN, READ = 41, 42, 43  # seeds of patterns

_IMPORTERS = ("edu", "model")  # what the importer module can drive


@dataclass(frozen=True)
class BufferPair:
    """``importer`` does DMA to the memory that ``exporter`` has exported."""

    node: str
    importer: Function
    exporter: Function
    route: Route

    def __str__(self) -> str:
        return f"{self.importer.name}-{self.exporter.name}"


def buffer_pairs(plan: RackPlan) -> list[BufferPair]:
    """All pairs of a video memory and a device of another slot that can import it."""
    found = []
    for name, node in plan.nodes.items():
        importers = [f for f in node.by_role(Role.ENGINE, Role.DOORBELL) if f.kind in _IMPORTERS]
        for exporter in node.by_role(Role.VRAM):
            for importer in importers:
                if importer.device != exporter.device:
                    route = route_between(node, plan.topology.nodes[name], importer, exporter)
                    found.append(BufferPair(name, importer, exporter, route))
    return found


def errno_word(number: int) -> str:
    """``EINVAL``; ``no error`` for 0."""
    if number == EOPNOTSUPP:  # which Python calls ENOTSUP
        return "EOPNOTSUPP"
    return errorcode.get(number, str(number)) if number else "no error"


def judge_errno(what: str, got: int, *wanted: int) -> Judgement:
    """Did a step end as it must?"""
    words = " or ".join(map(errno_word, wanted))
    said = f"{what}: {errno_word(got)}"
    if got in wanted:
        return Judgement(True, said, (Note(said),))
    return Judgement(False, f"{said} instead of {words}", (Note(said),))


@dataclass(frozen=True)
class Range:
    """A part of the exporter's BAR."""

    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Entry:
    """One entry of the scatter list that an importer was given."""

    address: int
    size_bytes: int
    is_bus: bool
    has_page: bool


@dataclass(frozen=True)
class Mapped:
    """What mapping an attachment gave. The entries are the first 64."""

    errno: int
    size_bytes: int
    entries: tuple[Entry, ...]

    def address(self, offset: int) -> int:
        """The bus address of a place in the buffer."""
        for entry in self.entries:
            if offset < entry.size_bytes:
                return entry.address + offset
            offset -= entry.size_bytes
        raise ValueError(f"the scatter list ends before {offset:#x}")

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """For the outcome."""
        lines = [
            f"{e.address:#x} + {e.size_bytes:#x}{', bus address' if e.is_bus else ''}"
            f"{'' if e.has_page else ', no page'}"
            for e in self.entries[:4]
        ]
        return (Counter("mapped", self.size_bytes, "bytes"), *map(Note, lines))


@dataclass
class Exchange:
    """A pair on a running node, whose functions the two modules drive.

    ``by_iova``  the device is given addresses that the IOMMU translates.
    ``vfio``     VFIO has the exporter's function, and lets nobody else look at its memory.
    ``mutation`` what is broken on purpose.
    """

    node: RackNode = field(repr=False)
    pair: BufferPair
    iommu: Iommu
    by_iova: bool
    bus_address: int
    machine_watched: bool
    vfio: bool = False
    mutation: Mutation = Mutation.NONE
    _numbers: count[int] = field(default_factory=count, repr=False)

    def call(self, method: str, **params: Any) -> Any:
        """One of the agent's methods about dma-bufs."""
        return self.node.agent.call(f"dmabuf.{method}", **params)

    @property
    def broken(self) -> Break:
        """What the mutation breaks here."""
        return break_of(self.mutation)

    def name(self, kind: str) -> str:
        """One that was not used yet."""
        return f"{kind}{next(self._numbers)}"

    def export(
        self,
        mode: str,
        *ranges: Range,
        revocable: bool = False,
        chunk_bytes: int = 0,
        by_child: bool = False,
    ) -> Buffer:
        """A dma-buf of parts of the exporter's memory; the step's errno is in it.

        ``chunk_bytes``: of mode ``no-check``, how much is mapped at once; 0: each range.
        """
        wanted = ranges or (Range(BUFFER_OFFSET, BUFFER_BYTES),)
        name = self.name("buffer")
        given = self.broken.ranges([(each.offset, each.size_bytes) for each in wanted])
        broken_mode = self.broken.modes.get(mode, mode)
        answer = self.call(
            "export",
            name=name,
            device=self.pair.exporter.bdf,
            bar=VRAM_BAR,
            mode=broken_mode,
            ranges=[{"offset": offset, "size_bytes": size} for offset, size in given],
            revocable=revocable and mode == broken_mode,
            chunk_bytes=chunk_bytes,
            by_child=by_child,
        )
        if broken_mode == "pages" and not answer["errno"]:
            wanted = (Range(answer["offset"], wanted[0].size_bytes),)
        buffer = Buffer(self, name, answer["errno"], wanted)
        if self.broken.exporter and not buffer.errno:
            buffer.call("careless", words=list(self.broken.exporter))
        return buffer

    def export_vfio(self, container: int, *ranges: Range, flags: int = 0) -> Buffer:
        """As :meth:`export`, by the kernel's own VFIO exporter."""
        wanted = ranges or (Range(BUFFER_OFFSET, BUFFER_BYTES),)
        name = self.name("vfio")
        answer = self.call(
            "export_vfio",
            name=name,
            container=container,
            device=self.pair.exporter.bdf,
            bar=VRAM_BAR,
            ranges=[{"offset": r.offset, "size_bytes": r.size_bytes} for r in wanted],
            flags=flags,
        )
        return Buffer(self, name, answer["errno"], wanted)

    @property
    def _target(self) -> dict[str, Any]:
        return {"bar": self.pair.exporter.bdf, "index": VRAM_BAR}

    def poke(self, bar_offset: int, data: bytes) -> None:
        """Let the guest's CPU write to the video memory, past any dma-buf."""
        if self.vfio:
            place: dict[str, Any] = {"target": self._target, "offset": bar_offset}
            self.node.agent.call("memory.write", **place, hex=data.hex())
        else:
            place = {"device": self.pair.exporter.bdf, "bar": VRAM_BAR, "offset": bar_offset}
            self.call("poke", **place, hex=data.hex())

    def judge_page(self, bar_offset: int, expected: bytes) -> Judgement:
        """Do the guest's CPU and the host read ``expected`` in a page of the video memory?"""
        exporter = self.pair.exporter
        if self.vfio:
            place: dict[str, Any] = {"target": self._target, "offset": bar_offset}
            answer = self.node.agent.call("memory.read", **place, size_bytes=PAGE_BYTES)
        else:
            place = {"device": exporter.bdf, "bar": VRAM_BAR, "offset": bar_offset}
            answer = self.call("peek", **place)
        guest = bytes.fromhex(answer["hex"])
        return judge_video_page(self.node, exporter, bar_offset, expected, guest)


@dataclass(frozen=True)
class Buffer:
    """One dma-buf."""

    exchange: Exchange = field(repr=False)
    name: str
    errno: int
    ranges: Sequence[Range]

    @property
    def size_bytes(self) -> int:
        """In all."""
        return sum(each.size_bytes for each in self.ranges)

    def bar_offset(self, offset: int) -> int:
        """Where in the BAR a place of the buffer is."""
        for each in self.ranges:
            if offset < each.size_bytes:
                return each.offset + offset
            offset -= each.size_bytes
        raise ValueError(f"{offset:#x} is beyond the buffer's end")

    def attach(self, manners: Sequence[str], **options: int) -> Import:
        """Attach the pair's importer; the step's errno is in the answer.

        ``options``: ``mask`` (bits of its addresses), ``delay`` (milliseconds before it unmaps).
        """
        words = [*manners, *(f"{key}={value}" for key, value in options.items())]
        words = self.exchange.broken.manners(words)
        name = self.exchange.name("import")
        answer = self.exchange.call(
            "attach",
            name=name,
            buffer=self.name,
            device=self.exchange.pair.importer.bdf,
            manners=words,
        )
        return Import(self.exchange, self, name, answer["errno"])

    def call(self, method: str, **params: Any) -> Any:
        """``revoke``, ``restore``, ``move``, ``state``, ``mmap`` or ``close``."""
        if method == "revoke" and self.exchange.mutation is Mutation.SKIP_REVOKE:
            return {"fences": 0, "unmaps": 0, "fences_ns": 0, "unmaps_ns": 0, "mapped": ""}
        if method == "close" and self.exchange.mutation is Mutation.FREE_EARLY:
            self.exchange.call("abandon", name=self.name)
        return self.exchange.call(method, name=self.name, **params)


@dataclass
class Import:
    """One importer of a buffer."""

    exchange: Exchange = field(repr=False)
    buffer: Buffer
    name: str
    errno: int
    mapped: Mapped = field(default=Mapped(0, 0, ()))

    def map(self) -> Mapped:
        """Map the attachment; what was mapped before is remembered if this fails."""
        return self._listed(self.exchange.call("map", name=self.name))

    def show(self) -> Mapped:
        """What is mapped now, by whomever; ENODEV if nothing is."""
        return self._listed(self.exchange.call("show", name=self.name))

    def _listed(self, answer: dict[str, Any]) -> Mapped:
        entries = tuple(
            Entry(each["address"], each["length"], bool(each["bus"]), bool(each["page"]))
            for each in answer["list"]
        )
        mapped = Mapped(answer["errno"], answer["bytes"], entries)
        if not mapped.errno:
            self.mapped = mapped
        return mapped

    def command(self, command: str) -> Any:
        """``unmap``, ``detach``, ``state``, or ``fence MS``."""
        return self.exchange.call("import", name=self.name, command=command)

    def write(self, offset: int, data: bytes, how: str = "dma") -> int:
        """Let the device (or, ``pages`` and ``vmap``, the CPU) write; what it says of it."""
        answer = self.exchange.call("write", name=self.name, offset=offset, hex=data.hex(), how=how)
        return int(answer["errno"])

    def read(self, offset: int, how: str = "dma") -> tuple[int, bytes]:
        """Let the device or the CPU read a page: what it says of it, and the bytes."""
        answer = self.exchange.call(
            "read", name=self.name, offset=offset, size_bytes=PAGE_BYTES, how=how
        )
        return answer["errno"], bytes.fromhex(answer["hex"])

    def late(self, offset: int, data: bytes, after_us: int) -> Any:
        """A write that is under way while the buffer is unmapped: ``dmabuf.late`` of the agent."""
        place = {"name": self.name, "offset": offset, "hex": data.hex()}
        return self.exchange.call("late", **place, after_us=after_us)

    def close(self) -> None:
        """Unmap and detach."""
        self.exchange.call("close_import", name=self.name)

    def deliver(self, offset: int = 0) -> Judgement:
        """Let the device write a page and read one; judged in the video memory and by its way.

        What the device says of it is evidence and decides nothing.
        """
        exchange, at = self.exchange, self.buffer.bar_offset(offset)
        written, read = pattern(WRITTEN, at, PAGE_BYTES), pattern(READ, at, PAGE_BYTES)
        exchange.poke(at, pattern(STALE, at, PAGE_BYTES))
        faults = FaultWatch(exchange.node, machine_watched=exchange.machine_watched)
        witness = DeviceWitness.of(exchange.node, exchange.pair.importer)
        with (
            TranslationWatch(exchange.node) as translations,
            PathWatch(witness) as paths,
            faults,
        ):
            said = self.write(offset, written)
        arrived = exchange.judge_page(at, written)
        claim = Counter(CLAIM, 0 if said else PAGE_BYTES, "bytes")
        wrote = all_of(
            judge_no_fault(faults.window), arrived, self._judge_way(offset, translations, paths)
        )
        if not wrote.holds:
            return Judgement(False, wrote.reason, (claim, *wrote.evidence))
        # Other bytes than the device has seen: it hands on what it held where a read is refused.
        exchange.poke(at, read)
        with FaultWatch(exchange.node, machine_watched=exchange.machine_watched) as faults:
            _, found = self.read(offset)
        importer = exchange.pair.importer.name
        fetched = judge_bytes(
            f"what {importer} read", PAGE_BYTES, sha256(read), guest=sha256(found), host=None
        )
        both = all_of(judge_no_fault(faults.window), fetched)
        return Judgement(both.holds, both.reason, (claim, *wrote.evidence, *both.evidence))

    def refused(self, offset: int = 0, how: str = "stale") -> Judgement:
        """Is a write by the address that was mapped last refused, and does nothing move?"""
        exchange, at = self.exchange, self.buffer.bar_offset(offset)
        stale = pattern(STALE, at, PAGE_BYTES)
        exchange.poke(at, stale)
        with FaultWatch(exchange.node, machine_watched=exchange.machine_watched) as faults:
            self.write(offset, pattern(WRITTEN, at, PAGE_BYTES), how)
        fault = judge_fault(
            faults.window,
            requester=exchange.pair.importer.bdf,
            address=self.mapped.address(offset),
            access=Access.WRITE,
            reasons=reasons_of(exchange.iommu).unmapped_write,
            size_bytes=PAGE_BYTES,
        )
        return all_of(exchange.judge_page(at, stale), fault)

    def _judge_way(
        self, offset: int, translations: TranslationWatch, paths: PathWatch
    ) -> Judgement:
        exchange = self.exchange
        importer = exchange.pair.importer
        if importer.kind == "model":  # its accesses are translated outside QEMU, which traces none
            routed = exchange.pair.route is Route.SWITCH and not exchange.by_iova
            return paths.judge("peer" if routed else "iommu", PAGE_BYTES)
        if exchange.iommu.mode == "off":
            return Judgement(True, "without an IOMMU there are no translations")
        place = exchange.bus_address + self.buffer.bar_offset(offset)
        return translations.judge(importer.bdf, place, PAGE_BYTES, self.mapped.address(offset))
