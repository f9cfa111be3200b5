# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-dmabuf``, fourth part: buffers that move behind a fence, importers that fault.

An exporter may hand out a new mapping while the copy to the new place is still queued. It puts a
fence of memory management (``DMA_RESV_USAGE_KERNEL``) into the reservation, for which importers
have to wait before any access (include/linux/dma-resv.h).
"""

from __future__ import annotations

from statistics import median

import pytest

from guest_agent.pattern import pattern
from testbed.errors import CapabilityMissing
from testbed.instruments.dmabuf import (
    ON_DEMAND,
    READ,
    WRITTEN,
    Buffer,
    Exchange,
    Import,
    judge_errno,
)
from testbed.instruments.memory import sha256
from testbed.instruments.observer import Observer, Refuted
from testbed.results.evidence import Counter, Note
from testbed.results.judging import PAGE_BYTES, judge_bytes
from testbed.suites.dmabuf_fixtures import THROUGH_HOST_BRIDGE, ArrangeBuffers, has_buffers
from testbed.suites.p2p_dmabuf import both_ends, imported, rack_variants

__all__ = ["rack_variants"]
pytest_plugins = ["testbed.suites.dmabuf_fixtures"]
pytestmark = [pytest.mark.boots(when=has_buffers), pytest.mark.without_disks]

TIMEOUT_MS = 2000
COPY_MS = 1000  # many calls of the agent: what comes meanwhile comes before the copy
FAULTS = 24
# Before a write is due, when the buffer is unmapped. Linux empties its queue after 10 ms.
LEADS_MS = (1, 3, 5, 7, 2, 4, 6, 8, 12, 60)
QUEUE_NS = 10_000_000
SURELY_LATE_NS = 300_000  # what ends sooner may have ended before the unmapping
OLD, NEW, LATER = WRITTEN, READ, 44  # seeds of patterns


@pytest.mark.requirement("LIFE-06")
def test_a_move_behind_a_fence(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """The new mapping is had while the copy is queued; reads and writes come after it."""
    exchange = arrange_buffers()
    buffer = exchange.export("movable")
    importer = imported(buffer, observe)
    both_ends(importer, observe)
    old, new, later = (pattern(seed, 0, PAGE_BYTES) for seed in (OLD, NEW, LATER))
    exchange.poke(buffer.bar_offset(0), old)

    moved_behind_a_fence(buffer, "system", observe)
    mapped_before_the_copy(importer, observe)
    reads(importer, old, observe)
    importer.write(0, new)  # in system memory, which the exporter copies from next

    moved_behind_a_fence(buffer, "vram", observe)
    mapped_before_the_copy(importer, observe)
    importer.write(PAGE_BYTES, later)  # before the copy, it would be overwritten
    observe.require(exchange.judge_page(buffer.bar_offset(PAGE_BYTES), later))
    reads(importer, new, observe)
    observe.require(exchange.judge_page(buffer.bar_offset(0), new))
    observe.conclude("mapped while the copy was queued; no access before its fence, both ways")


@pytest.mark.requirement("FLT-01")
def test_a_fault_is_served_and_again_after_a_move(
    arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """Nothing is mapped before the device wants it: fault, wait for the fence, map, go on."""
    exchange = arrange_buffers()
    buffer = exchange.export("movable")
    importer = buffer.attach(ON_DEMAND)
    observe.require(judge_errno("attach", importer.errno, 0))
    contents = pattern(OLD, 0, PAGE_BYTES)
    exchange.poke(buffer.bar_offset(0), contents)
    if importer.command("state")["mapped"]:
        raise Refuted("it is mapped before any access: no fault can be shown")
    for _ in range(2):  # the second time it is mapped
        reads(importer, contents, observe)
    faulted(importer, 1)
    for times, place in ((2, "system"), (3, "vram")):
        moved_behind_a_fence(buffer, place, observe)
        if importer.command("state")["mapped"]:
            raise Refuted("the buffer moved under an importer that had it mapped")
        reads(importer, contents, observe)
        faulted(importer, times)
    importer.show()
    both_ends(importer, observe)
    observe.conclude("a fault at the first access and one after each move; the bytes are right")


@pytest.mark.requirement("FLT-04")
def test_how_long_faults_take(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """Each is served, with the right bytes; a histogram of the kernel's time for it."""
    exchange = arrange_buffers()
    buffer = exchange.export("provider")
    importer = buffer.attach(ON_DEMAND)
    observe.require(judge_errno("attach", importer.errno, 0))
    took: list[int] = []
    for number in range(FAULTS):
        contents = pattern(number, 0, PAGE_BYTES)
        exchange.poke(buffer.bar_offset(0), contents)
        reads(importer, contents, observe if number == FAULTS - 1 else Observer())
        took.append(faulted(importer, number + 1))
        importer.command("unmap")
    observe.add(Counter("median", int(median(took)), "ns"), Counter("longest", max(took), "ns"))
    observe.add(*(Note(line) for line in histogram(took)))
    way = "by IOVA" if exchange.by_iova else f"by {exchange.pair.route}"
    observe.conclude(f"{FAULTS} faults of {exchange.pair.importer.kind} {way}, each served")


@pytest.mark.requirement("LIFE-04")
def test_how_long_dma_lands_after_an_unmapping(
    arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """A lazy IOMMU forgets a while after the unmapping (drivers/iommu/dma-iommu.c, its queue).

    The window is measured with writes that are under way when the buffer is unmapped, and it has to
    close: long after, nothing lands.
    """
    exchange = arrange_buffers(THROUGH_HOST_BRIDGE, name="lazy")
    observe.note(f"the importer's domain: {domain_type(exchange)}")
    buffer = exchange.export("provider")
    landed: list[int] = [0]
    refused: list[int] = []
    takes_us = 1 << 32
    for lead_ms in LEADS_MS:
        importer = imported(buffer, Observer())
        # Undisturbed first: so long it takes, and the IOMMU has to know the address, or there is
        # nothing that it could forget late.
        first = importer.late(0, pattern(OLD, 0, PAGE_BYTES), 0)
        observe.require(judge_errno("a write", first["errno"], 0))
        takes_us = min(takes_us, first["begun_ns"] // 1000)  # a busy host only adds to it
        late_ns, has_landed = late_write(importer, takes_us, lead_ms, observe)
        importer.close()
        if late_ns < SURELY_LATE_NS:
            continue
        (landed if has_landed else refused).append(late_ns)
        verb = "landed" if has_landed else "was refused"
        observe.note(f"a write {late_ns / 1e6:.1f} ms after the unmapping {verb}")
    if not refused or max(refused) < max(landed):
        raise Refuted(f"a write landed {max(landed) / 1e6:.1f} ms after the unmapping")
    if not max(landed) and min(refused) > QUEUE_NS:
        raise CapabilityMissing("a host that is less busy: no write came soon after an unmapping")
    observe.add(Counter("latest that landed", max(landed), "ns"))
    observe.add(Counter("earliest refused", min(refused), "ns"))
    latest, earliest = max(landed) / 1e6, min(refused) / 1e6
    seen = f"writes landed until {latest:.1f} ms after" if len(landed) > 1 else "none landed after"
    observe.conclude(f"{seen}; the earliest that was refused: {earliest:.1f} ms after")


def domain_type(exchange: Exchange) -> str:
    """The kernel's word: ``DMA-FQ`` has a queue of what is to be forgotten, ``DMA`` has none."""
    for group in exchange.node.agent.call("iommu.groups"):
        if exchange.pair.importer.bdf in group["devices"]:
            return str(group["type"])
    return "none"


def late_write(
    importer: Import, takes_us: int, lead_ms: int, observe: Observer
) -> tuple[int, bool]:
    """How long after the unmapping a write was made that was due ``lead_ms`` later, in ns, and
    whether it landed.

    :param takes_us: from the doorbell until it is made.
    """
    exchange, at = importer.exchange, importer.buffer.bar_offset(0)
    before, late = pattern(NEW, 0, PAGE_BYTES), pattern(LATER, 0, PAGE_BYTES)
    exchange.poke(at, before)
    answer = importer.late(0, late, max(takes_us - 1000 * lead_ms, 1))
    has_landed = exchange.judge_page(at, late).holds
    if not has_landed:
        observe.require(exchange.judge_page(at, before))
    return answer["late_ns"], has_landed


def histogram(took_ns: list[int]) -> list[str]:
    """Lines of ``from to count``, in powers of two of a microsecond."""
    powers = [max(each // 1000, 1).bit_length() - 1 for each in took_ns]
    return [
        f"{1 << power} to {2 << power} us: {powers.count(power)}"
        for power in range(min(powers), max(powers) + 1)
    ]


def moved_behind_a_fence(buffer: Buffer, place: str, observe: Observer) -> None:
    """The buffer is elsewhere, and its contents are on their way."""
    answer = buffer.call("move", to=place, timeout_ms=TIMEOUT_MS, copy_ms=COPY_MS)
    observe.require(judge_errno(f"move to {place}", answer["errno"], 0))


def mapped_before_the_copy(importer: Import, observe: Observer) -> None:
    """It is given its new mapping at once."""
    observe.require(judge_errno("map", importer.map().errno, 0))
    if not importer.command("state")["pending"]:
        raise Refuted("no fence was pending when it was mapped: nothing was pipelined")


def reads(importer: Import, expected: bytes, observe: Observer) -> None:
    """The device reads these bytes from the first page."""
    error, found = importer.read(0)
    waited = importer.command("state")["waited_ns"]
    observe.add(Counter("waited for the fence", waited, "ns"))
    who = importer.exchange.pair.importer.name
    observe.note(f"{who} says {error}")
    observe.require(
        judge_bytes(
            f"what {who} read", PAGE_BYTES, sha256(expected), guest=sha256(found), host=None
        )
    )


def faulted(importer: Import, times: int) -> int:
    """It has faulted that often in all; how long the last one took, in ns."""
    state = importer.command("state")
    if state["faults"] != times:
        raise Refuted(f"{state['faults']} faults, not {times}")
    return int(state["fault_ns"])
