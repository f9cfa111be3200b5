# SPDX-License-Identifier: Apache-2.0
"""A process's memory that has migrated into a GPU, and devices that look at it (HMM).

The guest's module ``hmm_peer`` (guest_agent/kmod) does what it is told: who may see whose private
pages is decided by the kernel's ``hmm_range_fault()``, how a page is mapped by its
``hmm_dma_map_pfn()`` and its rule of peer-to-peer paths. Where a page is, is said by the kernel's
page table (pagemap) and by who reads its bytes: in video memory the guest's CPU through the BAR and
the host through the shared memory, in system memory the process and QEMU's own memory map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from guest_agent.pattern import pattern
from testbed.instruments.bench import CLAIM
from testbed.instruments.dmabuf import BufferPair
from testbed.instruments.faults import FaultWatch
from testbed.instruments.interface import RackNode
from testbed.instruments.memory import VRAM_BAR, by_machine, judge_video_page, sha256
from testbed.instruments.mutations import Mutation
from testbed.instruments.paths import DeviceWitness, PathWatch
from testbed.instruments.reasons import reasons_of
from testbed.instruments.translations import TranslationWatch
from testbed.results.evidence import Access, Counter, Note
from testbed.results.judging import (
    PAGE_BYTES,
    Judgement,
    all_of,
    judge_bytes,
    judge_fault,
    judge_no_fault,
)
from testbed.topology.machine import Iommu
from testbed.topology.plan import Function

MODULE = "hmm_peer"
PAGES = 4

# How a device looks: the module's words.
STOCK: tuple[str, ...] = ()
PEER = ("peer2peer",)

FILLED, STALE, WRITTEN, READ = 51, 52, 53, 54  # seeds of patterns

_WRONG_MANNERS = {
    Mutation.HMM_MIGRATE_ALL: (),
    Mutation.HMM_NO_CHECK: ("no-check",),
    Mutation.HMM_FAKE_PAGE: ("fake",),
}


@dataclass
class Workplace:
    """A pair on a running node, and the memory's own engine if the GPU model has it.

    ``by_iova``   the pair's device is given addresses that the IOMMU translates.
    """

    node: RackNode = field(repr=False)
    pair: BufferPair
    own_engine: Function | None
    iommu: Iommu
    by_iova: bool
    bus_address: int
    machine_watched: bool
    mutation: Mutation = Mutation.NONE
    numbers: count[int] = field(default_factory=count, repr=False)

    def call(self, method: str, **params: Any) -> Any:
        """One of the agent's methods about device-private memory."""
        return self.node.agent.call(f"hmm.{method}", **params)

    def memory(self) -> ProcessMemory:
        """New memory of a process in the guest, every page with a pattern of its own."""
        name = f"memory{next(self.numbers)}"
        self.call("alloc", name=name, pages=PAGES)
        memory = ProcessMemory(self, name)
        for page in range(PAGES):
            memory.write(page, memory.pattern(FILLED, page))
        return memory

    def faulted_back(self) -> int:
        """How many pages faults have taken out of the pair's video memory, ever."""
        return int(self.call("owner", device=self.pair.exporter.bdf)["to_ram"])

    def poke(self, offset: int, data: bytes) -> None:
        """Let the guest's CPU write to the video memory through the BAR."""
        place = {"device": self.pair.exporter.bdf, "bar": VRAM_BAR, "offset": offset}
        self.node.agent.call("dmabuf.poke", **place, hex=data.hex())

    def judge_video(self, offset: int, expected: bytes) -> Judgement:
        """Do the guest's CPU and the host read ``expected`` in a page of the video memory?"""
        exporter = self.pair.exporter
        place = {"device": exporter.bdf, "bar": VRAM_BAR, "offset": offset}
        guest = bytes.fromhex(self.node.agent.call("dmabuf.peek", **place)["hex"])
        return judge_video_page(self.node, exporter, offset, expected, guest)


@dataclass
class ProcessMemory:
    """Memory of a process: in system memory, or in the pair's video memory.

    ``offsets``  where each page was last in the BAR, once it was taken there.
    """

    place: Workplace = field(repr=False)
    name: str
    offsets: dict[int, int] = field(default_factory=dict)
    _back_before: int = 0

    def pattern(self, seed: int, page: int) -> bytes:
        """A page's own bytes."""
        return pattern(seed, page * PAGE_BYTES, PAGE_BYTES)

    def write(self, page: int, data: bytes) -> None:
        """By the process: a fault brings the page to system memory."""
        self.place.call("write", name=self.name, page=page, hex=data.hex())

    def read(self, page: int) -> bytes:
        """As :meth:`write`."""
        return bytes.fromhex(self.place.call("read", name=self.name, page=page)["hex"])

    def physical(self) -> list[int]:
        """Where each page is in system memory, -1 if it is not: the page table's word."""
        found: list[int] = self.place.call("pages", name=self.name)["physical"]
        return found

    def take(self) -> Judgement:
        """Migrate it into the pair's video memory. Is all of it there, byte for byte?"""
        exporter = self.place.pair.exporter
        answer = self.place.call("take", name=self.name, device=exporter.bdf)
        self.offsets = {int(page): offset for page, offset in answer["offsets"].items()}
        self._back_before = self.place.faulted_back()
        moved = Counter("taken", len(self.offsets), "pages")
        if len(self.offsets) != PAGES:
            return Judgement(False, f"{len(self.offsets)} of {PAGES} pages were taken", (moved,))
        there = [
            self.place.judge_video(offset, self.pattern(FILLED, page))
            for page, offset in self.offsets.items()
        ]
        return all_of(self.judge_in_video(), *there)

    def judge_in_video(self) -> Judgement:
        """Does the page table have every page in device memory, and did no fault take one back?"""
        return self._judge_place(present=0, back=0, words="left in video memory")

    def judge_in_system(self) -> Judgement:
        """Has a fault taken every page back to system memory?"""
        return self._judge_place(present=PAGES, back=PAGES, words="migrated to system memory")

    def _judge_place(self, present: int, back: int, words: str) -> Judgement:
        found = sum(each >= 0 for each in self.physical())
        returned = self.place.faulted_back() - self._back_before
        evidence = (
            Counter("present in the page table", found, "pages"),
            Counter("taken back by faults", returned, "pages"),
        )
        if (found, returned) == (present, back):
            return Judgement(True, f"{words}: {PAGES} pages", evidence)
        said = f"{found} of {PAGES} pages are in system memory, faults took {returned} back"
        return Judgement(False, f"not {words}: {said}", evidence)

    def judge_system(self, page: int, expected: bytes) -> Judgement:
        """Do the process and QEMU's memory map read ``expected`` in a page of system memory?"""
        physical = self.physical()[page]
        guest = self.read(page)
        if physical < 0:
            return Judgement(False, f"page {page} was not in system memory")
        return judge_bytes(
            f"page {page} at {physical:#x}",
            PAGE_BYTES,
            sha256(expected),
            guest=sha256(guest),
            host=sha256(by_machine(self.place.node, physical, PAGE_BYTES)),
        )

    def look(self, manners: Sequence[str] = STOCK) -> Mirror:
        """The pair's device looks at it. With a mutation, in a wrong way."""
        mutation = self.place.mutation
        if manners == PEER:
            manners = _WRONG_MANNERS.get(mutation, manners)
        elif mutation is Mutation.HMM_ANY_GROUP:
            manners = (self._own_group,)
        return self._look(self.place.pair.importer, manners)

    def look_as_owner(self, engine: Function) -> Mirror:
        """The memory's own engine looks at it."""
        own = self.place.mutation is not Mutation.HMM_NO_GROUP
        return self._look(engine, (self._own_group,) if own else STOCK)

    @property
    def _own_group(self) -> str:
        return f"group={self.place.pair.exporter.bdf}"

    def _look(self, device: Function, manners: Sequence[str]) -> Mirror:
        name = f"mirror{next(self.place.numbers)}"
        answer = self.place.call(
            "mirror", mirror=name, name=self.name, device=device.bdf, manners=list(manners)
        )
        return Mirror(self, name, device, answer["errno"], _seen(answer))


@dataclass(frozen=True)
class Seen:
    """How a device has one page: ``private`` (an offset in its own memory), ``peer``, ``system``,
    or ``none``; ``is_bus``: by a peer's bus address.
    """

    address: int
    kind: str
    is_bus: bool


def _seen(answer: dict[str, Any]) -> tuple[Seen, ...]:
    return tuple(Seen(e["address"], e["kind"], bool(e["bus"])) for e in answer["pages"])


@dataclass(frozen=True)
class Mirror:
    """One device's view of a memory, as it was made."""

    memory: ProcessMemory = field(repr=False)
    name: str
    device: Function
    errno: int
    pages: tuple[Seen, ...]

    @property
    def evidence(self) -> tuple[Note, ...]:
        """For the outcome."""
        words = (
            f"page {n}: {page.kind} {page.address:#x}{', bus address' if page.is_bus else ''}"
            for n, page in enumerate(self.pages)
        )
        return tuple(map(Note, words))

    def state(self) -> tuple[int, tuple[Seen, ...]]:
        """How often it was told that a page changed, and what it has now."""
        answer = self.memory.place.call("state", mirror=self.name)
        return answer["told"], _seen(answer)

    def judge_told(self) -> Judgement:
        """Was it told of every page, and has it none any more?"""
        told, pages = self.state()
        left = sum(page.kind != "none" for page in pages)
        evidence = (Counter("told", told, "pages"), Counter("still mapped", left, "pages"))
        words = f"{self.device.name} was told of {told} of {PAGES} pages, and has {left}"
        return Judgement(told >= PAGES and not left, words, evidence)

    def judge_peers(self) -> Judgement:
        """Has every page an address of the bus that is right for where the two devices stand?

        Below a switch the BAR's own; through the host bridge one that the IOMMU translates.
        """
        place = self.memory.place
        for number, page in enumerate(self.pages):
            bar = place.bus_address + self.memory.offsets[number]
            if page.kind != "peer":
                return Judgement(False, f"page {number}: {page.kind}, not a peer's", self.evidence)
            if page.is_bus is place.by_iova or (page.address == bar) is place.by_iova:
                wanted = "an IOVA" if place.by_iova else f"the BAR's {bar:#x}"
                said = f"page {number}: {page.address:#x} instead of {wanted}"
                return Judgement(False, said, self.evidence)
        return Judgement(True, "dma addresses as the topology has it", self.evidence)

    def judge_kind(self, kind: str) -> Judgement:
        """Is every page of that kind?"""
        kinds = sorted({page.kind for page in self.pages})
        said = f"{self.device.name} has pages of kind {', '.join(kinds)}"
        if kinds == [kind]:
            return Judgement(True, said, self.evidence)
        return Judgement(False, f"{said} instead of {kind}", self.evidence)

    def deliver_video(self, page: int, path: str) -> Judgement:
        """Let the device write a page and read one, which are in video memory.

        ``path``: the way that the GPU model's own count must show; QEMU's translation for edu.
        """
        place, at = self.memory.place, self.memory.offsets[page]
        written, read = self.memory.pattern(WRITTEN, page), self.memory.pattern(READ, page)
        place.poke(at, self.memory.pattern(STALE, page))
        wrote = self._write(page, written, path, place.bus_address + at)
        wrote = all_of(wrote, place.judge_video(at, written))
        if not wrote.holds:
            return wrote
        # Other bytes than the device has seen: it hands on what it held where a read is refused.
        place.poke(at, read)
        return all_of(wrote, self._read(page, read))

    def deliver_system(self, page: int) -> Judgement:
        """Let the device read a page and write one, which are in system memory.

        It reads what the process last wrote, before or after the migration.
        """
        memory, written = self.memory, self.memory.pattern(WRITTEN, page)
        fetched = self._read(page, memory.pattern(FILLED, page))
        wrote = self._write(page, written, "iommu", memory.physical()[page])
        return all_of(fetched, wrote, memory.judge_system(page, written))

    def refused(self, page: int) -> Judgement:
        """Is a write by the address that it had refused, and does nothing move?"""
        place, at = self.memory.place, self.memory.offsets[page]
        stale = self.memory.pattern(STALE, page)
        place.poke(at, stale)
        with FaultWatch(place.node, machine_watched=place.machine_watched) as faults:
            self._dma_write(page, self.memory.pattern(WRITTEN, page), stale=True)
        fault = judge_fault(
            faults.window,
            requester=self.device.bdf,
            address=self.pages[page].address,
            access=Access.WRITE,
            reasons=reasons_of(place.iommu).unmapped_write,
            size_bytes=PAGE_BYTES,
        )
        return all_of(place.judge_video(at, stale), fault)

    def _write(self, page: int, data: bytes, path: str, physical: int) -> Judgement:
        place = self.memory.place
        witness = DeviceWitness.of(place.node, self.device)
        faults = FaultWatch(place.node, machine_watched=place.machine_watched)
        with (
            TranslationWatch(place.node) as translations,
            PathWatch(witness) as paths,
            faults,
        ):
            said = self._dma_write(page, data)
        claim = Judgement(True, "", (Counter(CLAIM, 0 if said else PAGE_BYTES, "bytes"),))
        if witness is not None:
            way = paths.judge(path, PAGE_BYTES)
        else:
            way = translations.judge(
                self.device.bdf, physical, PAGE_BYTES, self.pages[page].address
            )
        return all_of(claim, judge_no_fault(faults.window), way)

    def _read(self, page: int, expected: bytes) -> Judgement:
        place = self.memory.place
        with FaultWatch(place.node, machine_watched=place.machine_watched) as faults:
            answer = place.call("dma_read", mirror=self.name, page=page)
        found = judge_bytes(
            f"what {self.device.name} read of page {page}",
            PAGE_BYTES,
            sha256(expected),
            guest=sha256(bytes.fromhex(answer["hex"])),
            host=None,
        )
        return all_of(judge_no_fault(faults.window), found)

    def _dma_write(self, page: int, data: bytes, *, stale: bool = False) -> int:
        answer = self.memory.place.call(
            "dma_write", mirror=self.name, page=page, hex=data.hex(), stale=stale
        )
        return int(answer["errno"])
