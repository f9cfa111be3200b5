# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-dmabuf``, second part: buffers are taken back, move, and outlive their exporters."""

from __future__ import annotations

from errno import EBUSY, ENODEV, EOPNOTSUPP, ETIMEDOUT

import pytest

from guest_agent.pattern import pattern
from testbed.errors import CapabilityMissing
from testbed.instruments.dmabuf import (
    DYNAMIC,
    PEER,
    PINNED,
    REVOCABLE,
    STATIC,
    WRITTEN,
    Buffer,
    judge_errno,
)
from testbed.instruments.memory import sha256
from testbed.instruments.observer import Observer, Refuted
from testbed.results.evidence import Counter
from testbed.results.judging import PAGE_BYTES, judge_bytes
from testbed.suites.dmabuf_fixtures import THROUGH_HOST_BRIDGE, ArrangeBuffers, has_buffers
from testbed.suites.p2p_dmabuf import both_ends, imported

pytest_plugins = ["testbed.suites.dmabuf_fixtures"]
pytestmark = [pytest.mark.boots(when=has_buffers), pytest.mark.without_disks]

STUBBORN = (*REVOCABLE, "stubborn")
FENCE_MS, UNMAP_MS = 400, 500
TICKS_MS = 10  # the kernel's clock and its timers: so much less is not a wait cut short
TIMEOUT_MS = 2000
SHORT_MS = 300  # for what does not come


@pytest.mark.requirement("LIFE-01")
def test_importers_that_cannot_be_told(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """Static, or no peer-to-peer, or not revocable: refused by an exporter that has only VRAM."""
    buffer = arrange_buffers().export("provider", revocable=True)
    for manners in (STATIC, DYNAMIC, PEER, PINNED):
        refusal = buffer.attach(manners).errno
        observe.require(judge_errno(" ".join(manners) or "static", refusal, EOPNOTSUPP))
    pinned = buffer.attach((*REVOCABLE, "pinned")).errno
    observe.require(judge_errno("pinned, and revocable all the same", pinned, 0))
    both_ends(imported(buffer, observe), observe)
    observe.conclude("only who can be told of a revoke may attach")


@pytest.mark.requirement("LIFE-01")
def test_a_buffer_that_can_move_does_so_first(
    arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """A GPU-like exporter: for an importer that cannot do with VRAM it is in system memory."""
    exchange = arrange_buffers()
    buffer = exchange.export("movable")
    first = imported(buffer, observe)
    both_ends(first, observe)
    contents = pattern(WRITTEN, 0, PAGE_BYTES)
    exchange.poke(buffer.bar_offset(0), contents)
    plain = buffer.attach(STATIC)
    observe.require(judge_errno("static attach", plain.errno, 0))
    state = buffer.call("state")
    if not state["in_system"]:
        raise Refuted("a static importer attached, and the buffer stayed in video memory")
    if first.command("state")["mapped"]:
        raise Refuted("the buffer moved under an importer that had it mapped")
    observe.require(judge_errno("map", plain.map().errno, 0))
    _, found = plain.read(0)
    who = exchange.pair.importer.name
    moved = judge_bytes(
        f"what {who} read", PAGE_BYTES, sha256(contents), guest=sha256(found), host=None
    )
    observe.require(moved)
    observe.conclude("it moved to system memory, with its contents, after the other let go")


@pytest.mark.requirement("LIFE-02")
def test_no_mapping_after_a_revoke(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """Map and attach after a revoke: ENODEV."""
    buffer = arrange_buffers().export("provider", revocable=True)
    importer = imported(buffer, observe)
    revoked(buffer, observe)
    observe.require(judge_errno("map after the revoke", importer.map().errno, ENODEV))
    observe.require(judge_errno("attach after it", buffer.attach(REVOCABLE).errno, ENODEV))
    observe.conclude("ENODEV for old importers and new ones")


@pytest.mark.requirement("LIFE-03")
def test_a_revoke_waits_for_fences_and_unmapping(
    arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """Importers are told; the exporter waits for their fence, then for the unmapping."""
    buffer = arrange_buffers().export("provider", revocable=True)
    importer = imported(buffer, observe, delay=UNMAP_MS)
    observe.require(judge_errno("fence", importer.command(f"fence {FENCE_MS}")["errno"], 0))
    answer = revoked(buffer, observe)
    # The fence's time runs since the call before, and on a busy host that was a while ago.
    for what, least_ms in (("fences", FENCE_MS // 2), ("unmaps", UNMAP_MS - TICKS_MS)):
        waited_ns = answer[f"{what}_ns"]
        observe.add(Counter(f"waited for {what}", waited_ns, "ns"))
        if waited_ns < least_ms * 1_000_000:
            raise Refuted(f"the exporter did not wait for {what}: {waited_ns} ns of {least_ms} ms")
    if importer.command("state")["invalidated"] != 1:
        raise Refuted("the importer was not told once")
    buffer.call("restore")
    observe.require(judge_errno("map again", importer.map().errno, 0))
    both_ends(importer, observe)
    observe.conclude("told, waited for fence and unmapping, mapped again after the restore")


@pytest.mark.requirement("LIFE-04")
def test_dma_after_a_revoke_faults(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """By the address that was mapped: refused at once, in strict mode."""
    exchange = arrange_buffers(THROUGH_HOST_BRIDGE)
    if exchange.iommu.mode != "strict":
        raise CapabilityMissing(f"iommu: {{mode: strict}}, not {exchange.iommu.mode}")
    for mode in ("provider", "pages"):
        buffer = exchange.export(mode)
        importer = imported(buffer, observe)
        both_ends(importer, observe)
        revoked(buffer, observe)
        observe.require(importer.refused())
        importer.close()


@pytest.mark.requirement("LIFE-05")
def test_an_importer_that_never_unmaps(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """It is named when the time is up, and what it still can do is shown."""
    exchange = arrange_buffers()
    buffer = exchange.export("provider", revocable=True)
    importer = buffer.attach(STUBBORN)
    observe.require(judge_errno("map", importer.map().errno, 0))
    answer = buffer.call("revoke", timeout_ms=SHORT_MS)
    observe.require(judge_errno("waiting for the unmapping", answer["unmaps"], ETIMEDOUT))
    if answer["mapped"] != exchange.pair.importer.bdf:
        raise Refuted(f"'{answer['mapped']}' was named, not {exchange.pair.importer.bdf}")
    observe.require(importer.deliver())
    observe.note("it still reaches the buffer: a revoke without unmapping revokes nothing")
    observe.require(judge_errno("unmap", importer.command("unmap")["errno"], 0))
    if buffer.call("state")["mapped"]:
        raise Refuted("it has unmapped, and is named all the same")
    observe.conclude(f"{answer['mapped']} is named after {SHORT_MS} ms")


@pytest.mark.requirement("LIFE-07")
def test_a_pinned_buffer_stays(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """Pinned, it does not move; without the pin it does."""
    buffer = arrange_buffers().export("movable")
    pinned = buffer.attach(PINNED)
    observe.require(judge_errno("pin", pinned.errno, 0))
    observe.require(judge_errno("map", pinned.map().errno, 0))
    move = {"to": "system", "timeout_ms": TIMEOUT_MS}
    observe.require(judge_errno("move of the pinned", buffer.call("move", **move)["errno"], EBUSY))
    both_ends(pinned, observe)
    pinned.close()
    unpinned = imported(buffer, observe)
    observe.require(judge_errno("move of the unpinned", buffer.call("move", **move)["errno"], 0))
    if unpinned.command("state")["mapped"]:
        raise Refuted("it moved under an importer that had it mapped")
    observe.conclude("pinned: EBUSY and still reached; unpinned: moved after the importer let go")


@pytest.mark.requirement("LIFE-11")
def test_the_exporting_process_ends(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """A process hands its buffer on and ends, its file is closed: the importer still has it."""
    for mode in ("pages", "provider"):
        exchange = arrange_buffers()
        buffer = exchange.export(mode, by_child=True)
        importer = imported(buffer, observe)
        buffer.call("close")
        both_ends(importer, observe)
        if mode == "pages":  # memory that was freed would be given to the next
            other = exchange.export(mode)
            if other.ranges[0].offset == buffer.ranges[0].offset:
                raise Refuted("the memory was given to another buffer under the importer")
        exchange.call("release")
    observe.conclude("the importer holds the buffer, whoever exported it is gone")


def revoked(buffer: Buffer, observe: Observer) -> dict[str, int]:
    """The buffer is taken back, and all its importers have let go."""
    answer: dict[str, int] = buffer.call("revoke", timeout_ms=TIMEOUT_MS)
    observe.require(judge_errno("fences", answer["fences"], 0))
    observe.require(judge_errno("unmapping", answer["unmaps"], 0))
    return answer
