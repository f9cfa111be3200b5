# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-fabric``: GPUs on a scale-up fabric, of one operating system and of several.

Physical mode is like an IOMMU in passthrough: the whole of a peer's memory is there. In virtual
mode only what was linked and synced is, and the machine enforces it. Every claim ends in bytes that
the owner's guest and the host see, or in a refusal that both ends have counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EINVAL, ERANGE

import pytest

from guest_agent.p2p import rules
from testbed.instruments.memory import sha256
from testbed.instruments.model_devices import copy, place
from testbed.instruments.observer import Observer, Refuted
from testbed.results.evidence import Counter
from testbed.results.judging import PAGE_BYTES, Judgement
from testbed.suites.fabric_ways import TARGET, Way
from testbed.suites.p2p_fabric_ground import has_fabric, judge_refusal, refusal

pytest_plugins = ["testbed.suites.p2p_fabric_ground"]
pytestmark = pytest.mark.boots(when=has_fabric)

MIB = 1 << 20
RESULT = 8 * MIB  # in the initiator's
SECRET, PUBLIC = 90, 91
FABRIC_RULES = {
    "reclaim": rules.UAL_RECLAIM,
    "notifier lock": rules.UAL_NOTIFIER,
    "reservation": rules.UAL_RESERVATION,
}


@pytest.mark.requirement("FAB-01")
def test_a_physical_address_needs_no_mapping(between: Way, observe: Observer) -> None:
    """The peer's page becomes an address with the route bit; nothing is allocated or mapped."""
    state = between.alloc(PAGE_BYTES, virtual=True)
    if state.iova_ranges != 1:
        raise Refuted(f"in virtual mode {state.iova_ranges} ranges were allocated, not 1")
    state.free()
    state = between.alloc(PAGE_BYTES, virtual=False)
    if state.iova_ranges:
        raise Refuted(f"{state.iova_ranges} ranges of addresses were allocated in physical mode")
    state.link(TARGET, PAGE_BYTES)
    address, entry = state.address()
    wanted = between.owner.identity << 40 | TARGET
    if (address["value"], address["physical"], entry) != (wanted, True, wanted | 1 << 51):
        raise Refuted(f"{address} with entry {entry} is not {wanted:#x} with route bit 51")
    virtual = between.map(address, 2 * PAGE_BYTES)
    observe.require(between.deliver(virtual, TARGET, 1, PAGE_BYTES))  # never synced
    observe.require(between.fetch(virtual, TARGET, 2, PAGE_BYTES))
    beyond = between.deliver(virtual + PAGE_BYTES, TARGET + PAGE_BYTES, 3, PAGE_BYTES)
    observe.require(beyond)  # never linked either: physical mode is the whole
    observe.conclude(f"{entry:#x} reaches the peer; no IOVA, no IOMMU mapping, no sync")


@pytest.mark.requirement("FAB-02")
def test_an_address_that_is_not_linked_faults(between: Way, observe: Observer) -> None:
    """And names the initiator; linked and synced it works; unlinked it faults again."""
    state = between.alloc(2 * PAGE_BYTES, virtual=True)
    address, _ = state.address()
    virtual = between.map(address, 2 * PAGE_BYTES)
    observe.require(between.refused(virtual, address["value"]))
    state.link(TARGET, PAGE_BYTES)
    state.sync(0, PAGE_BYTES)
    observe.require(between.deliver(virtual, TARGET, 4, PAGE_BYTES))
    observe.require(between.fetch(virtual, TARGET, 5, PAGE_BYTES))
    observe.require(between.refused(virtual + PAGE_BYTES, address["value"] + PAGE_BYTES))
    state.unlink(0)
    observe.require(between.refused(virtual, address["value"]))
    observe.conclude("refused before the link, carried after it, refused after the unlink")


@pytest.mark.requirement("FAB-03")
def test_what_is_not_exported_is_out_of_reach(between: Way, observe: Observer) -> None:
    """Whatever the other node's guest tries: the machine refuses, and both ends count."""
    owner, gpu = between.owner, between.initiator.gpu
    owner.gpu.vram.fill(0, owner.free_bytes, SECRET)
    state = between.alloc(2 * PAGE_BYTES, virtual=True)
    for page, writable in enumerate((True, False)):
        where = page * PAGE_BYTES
        state.link(TARGET + where, PAGE_BYTES, where, writable=writable)
    state.sync(0, 2 * PAGE_BYTES)
    address, _ = state.address()
    virtual = between.map(address, PAGE_BYTES)
    observe.require(between.deliver(virtual, TARGET, PUBLIC, PAGE_BYTES))
    iova = address["value"]
    before = owner.gpu.vram.read(0, owner.free_bytes)
    nothing = gpu.vram.fill(RESULT, PAGE_BYTES, 7)
    with _made_up(between):
        tried = _refuse_all(between, iova, observe)
    observe.require(gpu.vram.judge(RESULT, nothing))
    after = bytearray(owner.gpu.vram.read(0, owner.free_bytes))
    after[TARGET : TARGET + PAGE_BYTES] = before[TARGET : TARGET + PAGE_BYTES]
    same = sha256(bytes(after)) == sha256(before)
    observe.require(Judgement(same, "a byte of the other node changed" if not same else "no byte"))
    state.unlink(0)
    observe.require(between.refused(virtual, iova))  # the window is stale
    observe.conclude(f"{tried} places read and written: all refused, counted at both ends")


_PHYSICAL = 1 << 45


def _as_physical(way: Way) -> dict[str, object]:
    """An address that the initiator made up itself, as if physical mode were in use."""
    value = way.owner.identity << 40 | TARGET
    user, fabric = way.initiator.name, "ual0"
    address = {"kind": "fabric", "value": value, "user": user, "fabric": fabric, "physical": True}
    return {
        "owner": way.owner.name,
        "address": address,
        "virtual": _PHYSICAL,
        "size_bytes": PAGE_BYTES,
    }


@contextmanager
def _made_up(way: Way) -> Iterator[None]:
    """While the initiator's page tables lead to what it made up."""
    way.initiator.call("map", **_as_physical(way))
    try:
        yield
    finally:
        way.initiator.call("unmap", virtual=_PHYSICAL, size_bytes=PAGE_BYTES)


def _refuse_all(way: Way, iova: int, observe: Observer) -> int:
    """Every place that is tried is refused, read and written, and counted; answers how many."""
    owner, gpu, link = way.owner, way.initiator.gpu, way.links[0]
    attempts = [
        *(place("link", page, link) for page in range(0, owner.gpu.vram.size_bytes, MIB // 2)),
        *(place("link", 1 << bit, link) for bit in range(12, 64)),
        *(place("link", iova + delta, link) for delta in (-8, 2 * PAGE_BYTES, 1 << 20)),
        place("virtual", _PHYSICAL),  # a physical address, which the owner gives nobody now
    ]
    observe.add(Counter("places tried", len(attempts), "addresses"))
    counts = way.initiator.refusals(), owner.refusals()
    for one in attempts:
        for command in (
            copy(one, place("vram", RESULT), 8),
            {"op": "fill", "target": one, "size_bytes": 8, "value": 0},
        ):
            answer = gpu.submit(command)
            if (answer["status"] or {}).get("cause") != "link_refused":
                raise Refuted(f"{command['op']} at {one} ended with {answer['status']}")
    # A page that may be read only, and a copy that runs over the end of what is exported.
    for size, start in ((8, iova + PAGE_BYTES), (3 * PAGE_BYTES, iova)):
        answer = gpu.submit(copy(place("vram", 0), place("link", start, link), size))
        if (answer["status"] or {}).get("cause") != "link_refused":
            raise Refuted(f"{size} bytes to {start:#x} ended with {answer['status']}")
    _counted(way, counts, 2 * len(attempts) + 2, observe)
    return len(attempts)


def _counted(way: Way, before: tuple[int, int], least: int, observe: Observer) -> None:
    for member, count in zip((way.initiator, way.owner), before, strict=True):
        refused = member.refusals() - count
        observe.add(Counter(f"{member.name} refused", refused, "accesses"))
        if refused < least:
            raise Refuted(f"{member.name} has counted {refused} refusals of {least}")


@pytest.mark.requirement("FAB-04")
def test_within_one_system_physical_is_the_default(
    within: Way, between: Way, observe: Observer
) -> None:
    """Between two it is not; the API serves both modes in both cases."""
    for way, wanted in ((within, "physical"), (between, "virtual")):
        for virtual in (None, True, False):
            state = way.alloc(PAGE_BYTES, virtual=virtual)
            if virtual is None and state.mode != wanted:
                raise Refuted(f"{way.initiator.name}: the default is {state.mode}, not {wanted}")
            state.link(TARGET, PAGE_BYTES)
            state.sync(0, PAGE_BYTES)
            window = way.map(state.address()[0], PAGE_BYTES)
            observe.require(way.deliver(window, TARGET, 10 + bool(virtual), PAGE_BYTES))
            state.destroy(PAGE_BYTES)
    observe.conclude("physical within one system, virtual between two; both modes carry bytes")


@pytest.mark.requirement("FAB-05")
def test_link_sync_unlink_and_free(between: Way, observe: Observer) -> None:
    """A link is invisible before the sync, which shows all; free with holes is refused."""
    state = between.alloc(4 * PAGE_BYTES, virtual=True)
    address, _ = state.address()
    virtual = between.map(address, 4 * PAGE_BYTES)
    for page in (0, 1, 3):
        state.link(TARGET + page * PAGE_BYTES, PAGE_BYTES, page * PAGE_BYTES)
    for page in (0, 1, 3):
        at = page * PAGE_BYTES
        observe.require(between.refused(virtual + at, address["value"] + at))
    state.sync(0, 4 * PAGE_BYTES)
    for page in (0, 1, 3):
        at = page * PAGE_BYTES
        observe.require(between.deliver(virtual + at, TARGET + at, 20 + page, PAGE_BYTES))
    observe.require(between.refused(virtual + 2 * PAGE_BYTES, address["value"] + 2 * PAGE_BYTES))
    holes = refusal(state.destroy, 4 * PAGE_BYTES)
    observe.require(judge_refusal("destroy with a hole", holes, "RuleError", "destroy"))
    linked = refusal(state.free)
    observe.require(judge_refusal("free with links", linked, "RuleError", "free"))
    observe.require(between.deliver(virtual, TARGET, 24, PAGE_BYTES))  # nothing was undone
    for page in (0, 1, 3):
        state.unlink(page * PAGE_BYTES)
        at = page * PAGE_BYTES
        observe.require(between.refused(virtual + at, address["value"] + at))
    state.free()
    again = refusal(state.address)
    observe.require(judge_refusal("use after free", again, "ParameterError", "there is no"))
    observe.conclude("visible after the sync alone; holes and links refused; freed when unlinked")


@pytest.mark.requirement("FAB-06")
@pytest.mark.parametrize("context", list(FABRIC_RULES))
def test_contexts_in_which_addresses_are_not_allocated(
    between: Way, context: str, observe: Observer
) -> None:
    """``ual_iova_alloc`` names the rule, in either mode; ``dma_iova_alloc`` there is allowed."""
    for virtual in (True, False):
        got = refusal(between.alloc, PAGE_BYTES, virtual=virtual, context=[context])
        what = f"ual_iova_alloc, {context}"
        observe.require(judge_refusal(what, got, "RuleError", FABRIC_RULES[context].text))
    state = between.alloc(PAGE_BYTES, virtual=True)  # without the context it is given
    state.link(TARGET, PAGE_BYTES)
    state.sync(0, PAGE_BYTES)
    bench, gpu = between.initiator.gpu.bench, between.initiator.gpu
    source, target = bench.buffer("fabric-dma", PAGE_BYTES), bench.mapper.map(gpu.vram, RESULT)
    expected = source.fill(0, PAGE_BYTES, 30)
    answer = between.initiator.call(
        "dma_copy",
        container=bench.container,
        source=source.target,
        iova=bench.mapper.reserve(PAGE_BYTES),
        target_iova=target.iova,
        size_bytes=PAGE_BYTES,
        context=[context],
    )
    bench.mapper.unmap(target)
    if not answer["completed"]:
        raise Refuted(f"dma_iova_alloc, {context}: the copy by that address ended with {answer}")
    observe.require(gpu.vram.judge(RESULT, expected))
    observe.conclude(f"{context}: ual refused by rule, dma_iova allowed and carrying bytes")


@pytest.mark.requirement("FAB-07")
def test_addresses_of_the_wrong_type(between: Way, observe: Observer) -> None:
    """By type at the API, by value at the device: refused, and no bit is cut off."""
    state = between.alloc(PAGE_BYTES, virtual=True)
    state.link(TARGET, PAGE_BYTES)
    state.sync(0, PAGE_BYTES)
    address, _ = state.address()
    me, gpu = between.initiator, between.initiator.gpu
    dma = {"kind": "dma", "value": address["value"], "user": me.name}
    got = refusal(between.map, dma, PAGE_BYTES)
    observe.require(judge_refusal("dma_addr_t on the fabric", got, "AddressError", code=EINVAL))
    got = refusal(me.call, "on_pcie", address=address)
    observe.require(judge_refusal("fabric address on PCIe", got, "AddressError", code=EINVAL))
    got = refusal(between.map, {**address, "user": between.owner.name}, PAGE_BYTES)
    observe.require(judge_refusal("another's address", got, "AddressError", code=EINVAL))
    got = refusal(between.map, {**address, "fabric": "ual1"}, PAGE_BYTES)
    observe.require(judge_refusal("another fabric's", got, "AddressError", code=EINVAL))
    got = refusal(me.call, "on_pcie", address=dma, bits=32)
    observe.require(judge_refusal("36 bits of 32", got, "AddressError", code=ERANGE))
    wide = {**address, "value": 1 << 51, "physical": True}
    got = refusal(between.map, wide, PAGE_BYTES)
    observe.require(judge_refusal("beyond the route bit", got, "AddressError", code=ERANGE))
    # Past the API: the same number by the wrong port, and with a bit too many by the right one.
    before = between.owner.gpu.vram.read(0, between.owner.free_bytes)
    with gpu.bench.watch() as watch:
        answer = gpu.submit(copy(place("vram", 0), place("system", address["value"]), PAGE_BYTES))
    if answer["completed"] or not watch.window.records:
        raise Refuted(f"a fabric address on PCIe ended with {answer['status']}, and no fault")
    virtual = between.map(address, PAGE_BYTES)
    for bit in (40, 51, 52, 63):
        high = address["value"] | 1 << bit
        answer = gpu.submit(copy(place("vram", 0), place("link", high, between.links[0]), 8))
        if answer["status"] != {"cause": "link_refused", "address": high}:
            raise Refuted(f"{high:#x} on the link ended with {answer['status']}")
    if between.owner.gpu.vram.read(0, between.owner.free_bytes) != before:
        raise Refuted("a byte of the other node changed")
    observe.require(between.deliver(virtual, TARGET, 40, PAGE_BYTES))
    observe.conclude("refused by type at the API and by value at the device, none cut off")
