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
from testbed.instruments.dmabuf import (
    ON_DEMAND,
    READ,
    WRITTEN,
    Buffer,
    Import,
    judge_errno,
)
from testbed.instruments.memory import sha256
from testbed.instruments.observer import Observer, Refuted
from testbed.results.evidence import Counter, Note
from testbed.results.judging import PAGE_BYTES, judge_bytes
from testbed.suites.dmabuf_fixtures import ArrangeBuffers
from testbed.suites.p2p_dmabuf import both_ends, imported

pytest_plugins = ["testbed.suites.dmabuf_fixtures"]

TIMEOUT_MS = 2000
COPY_MS = 1000  # many calls of the agent: what comes meanwhile comes before the copy
FAULTS = 24
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
