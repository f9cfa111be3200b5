# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-iommu``: a device reaches another device's memory through the IOMMU, and only so.

Stock kernel, VFIO, QEMU's own devices. Bytes are judged at their destination, by the guest through
the BAR and by the host through the shared memory behind it; faults by requester, page, direction
and reason, from the guest kernel's log and QEMU's trace. MAP-01 gates the rest: where the IOMMU
does not translate, nothing else here means anything.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from testbed.errors import CapabilityMissing, LaunchError
from testbed.harness.racks import LiveRack
from testbed.instruments.bench import CLAIM, Bench
from testbed.instruments.cases import Doorbell, Pair
from testbed.instruments.doorbells import DoorbellPage
from testbed.instruments.groups import identity_domains, judge_groups, observed_groups
from testbed.instruments.mapper import CHUNK_BYTES, Chunk
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.instruments.reasons import FIRST_STAGE, Reasons, reasons_of, why_not_shown
from testbed.results.evidence import Access, Counter
from testbed.results.judging import PAGE_BYTES, judge_no_fault, judge_storm
from testbed.suites.ground import LOCAL_OFFSET, PEER_OFFSET, PROBE_BYTES, Ground
from testbed.suites.p2p_fixtures import Variant, has_pairs, shared_bench
from testbed.topology.machine import Iommu
from testbed.topology.model import Topology
from testbed.topology.oracle import Route, iommu_groups

gated = pytest.mark.gated_by("MAP-01")

# Seeds of patterns: each place has one of its own, so that bytes tell where they come from.
MINE, THEIRS, FRESH = 1, 2, 3

STORM_FAULTS = {"edu": 5}  # ten a second
DEFAULT_STORM_FAULTS = 256


pytest_plugins = ["testbed.suites.p2p_fixtures"]
pytestmark = pytest.mark.without_disks


def _can_be_scalable(iommu: Iommu) -> bool:
    return iommu.kind == "intel" and not iommu.scalable and iommu.aw_bits == 48


def rack_variants(topology: Topology) -> dict[str, Topology]:
    """``scalable``: the same rack with first-stage tables, if its IOMMU can have them."""
    iommus = [node.iommu for node in topology.nodes.values()]
    if any(why_not_shown(iommu) or not _can_be_scalable(iommu) for iommu in iommus):
        return {}
    nodes = {
        name: replace(node, iommu=replace(node.iommu, scalable=True))
        for name, node in topology.nodes.items()
    }
    return {"scalable": replace(topology, nodes=nodes)}


# Without translation. These come before VFIO has the devices: it resets them when it lets go of
# them, a second for each slot. MAP-01 then also shows that translation is back.


@pytest.mark.requirement("TOPO-13")
def test_iommu_groups(rack: LiveRack, node_name: str, observe: Observer) -> None:
    """The groups predicted from the topology are those that the guest kernel made."""
    spec = rack.topology.nodes[node_name]
    if spec.iommu.kind == "none" or spec.iommu.mode == "off":
        raise CapabilityMissing("IOMMU off: there are no IOMMU groups")
    predicted = iommu_groups(rack.plan.nodes[node_name], spec)
    observe.require(judge_groups(predicted, observed_groups(rack.nodes[node_name])))


@pytest.mark.requirement("MAP-07")
def test_raw_address_without_translation(rack: LiveRack, pair: Pair, observe: Observer) -> None:
    """IOMMU off, or the devices' domains the identity: the same raw address works."""
    node = rack.nodes[pair.node]
    iommu = rack.topology.nodes[pair.node].iommu
    bypass: Any = nullcontext(())
    if iommu.kind != "none" and iommu.mode not in ("off", "passthrough"):
        bypass = identity_domains(node, [function.bdf for function in pair.functions])
    with bypass as groups:
        bench = Bench.open_raw(node, pair.functions)
        try:
            ground = Ground.of(bench, pair, local_bytes=PAGE_BYTES)
            local, peer = ground.local.bus_address, ground.peer.bus_address
            if local is None or peer is None:
                raise CapabilityMissing("the physical address of guest memory")
            local, peer = local + LOCAL_OFFSET, peer + PEER_OFFSET
            mine = ground.fill_local(MINE, PAGE_BYTES)
            ground.fill_peer(THEIRS, PAGE_BYTES)
            routed = pair.route is Route.SWITCH
            # By its bus address a GPU reads its own memory without going up either.
            path = "peer" if routed else None
            observe.require(ground.deliver_to_peer(local, peer, mine, path=path))
            fresh = ground.fill_peer(FRESH, PAGE_BYTES)
            observe.require(ground.deliver_to_local(peer, local, fresh, path=None))
        finally:
            bench.close()
    how = f"identity domain of groups {groups}" if groups else f"IOMMU {iommu.mode}"
    observe.note(how)
    observe.conclude("the raw address works, which proves nothing about the mapping code")


# With translation: MAP-01, and what it gates


@pytest.mark.requirement("MAP-01")
def test_unmapped_address_faults(
    rack: LiveRack, pair: Pair, mutation: Mutation, observe: Observer
) -> None:
    """The IOMMU translates, and not by the identity: holes and physical addresses fault."""
    iommu = rack.topology.nodes[pair.node].iommu
    if missing := why_not_shown(iommu):
        raise CapabilityMissing(missing)
    found = rack.nodes[pair.node].agent.call("system.info")["iommu"]
    if not found["present"]:
        raise Refuted(f"the topology has an {iommu.kind} IOMMU, and the guest found none")
    bench = shared_bench(rack, pair.node, mutation, pair)
    ground = Ground.of(bench, pair)
    reasons = reasons_of(iommu).unmapped_write
    # From guest memory: whether BARs are mapped rightly is not the question here.
    probe = bench.buffer("probe", PAGE_BYTES)
    probe.fill(0, PROBE_BYTES, MINE)
    source = ground.mapper.map(probe).iova
    observe.require(ground.write_refused(source, ground.mapper.hole(), reasons))
    victim = bench.buffer("victim", PAGE_BYTES)
    before = victim.fill(0, PAGE_BYTES, THEIRS)
    if victim.bus_address is not None:
        observe.require(ground.write_refused(source, victim.bus_address, reasons))
        observe.require(victim.judge(0, before))
    bench.clean()
    observe.conclude("DMA to an unmapped IOVA and to a physical address faults: it translates")


@gated
@pytest.mark.requirement("MAP-02")
def test_mapped_both_ways(each_ground: Ground, reasons: Reasons, observe: Observer) -> None:
    """A peer's VRAM at a chosen IOVA: all bytes of the range, none beside it, both directions."""
    ground, size = each_ground, each_ground.engine.bulk_bytes
    mine = ground.fill_local(MINE, size)
    peer, guard = ground.peer, PAGE_BYTES
    peer.fill(PEER_OFFSET - guard, size + 2 * guard, THEIRS)
    below = peer.read(PEER_OFFSET - guard, guard)
    above = peer.read(PEER_OFFSET + size, guard)
    local = ground.map_local()
    mapping = ground.mapper.map(peer, PEER_OFFSET, size)
    observe.add(mapping.evidence)

    observe.require(ground.deliver_to_peer(local, mapping.iova, mine))
    observe.require(peer.judge(PEER_OFFSET - guard, below))
    observe.require(peer.judge(PEER_OFFSET + size, above))
    observe.require(ground.write_refused(local, mapping.iova + size, reasons.unmapped_write))
    observe.require(peer.judge(PEER_OFFSET + size, above))

    fresh = ground.fill_peer(FRESH, size)
    observe.require(ground.deliver_to_local(mapping.iova, local, fresh))
    observe.conclude(f"{size} bytes each way, first to last byte, and none beside them")


@gated
@pytest.mark.requirement("MAP-03")
def test_raw_bar_address_faults(each_ground: Ground, reasons: Reasons, observe: Observer) -> None:
    """The peer's bus address instead of an IOVA (habanalabs v3): refused, nothing moved."""
    ground = each_ground
    peer = ground.peer
    assert peer.bus_address is not None
    if ground.route is Route.SWITCH:
        # No mistake of a driver is found here: see TOPO-16.
        raise CapabilityMissing("a path through the root complex: their switch routes this address")
    ground.fill_local(MINE, PROBE_BYTES)
    before = ground.fill_peer(THEIRS, PAGE_BYTES)
    local = ground.map_local()
    raw = peer.bus_address + PEER_OFFSET
    observe.require(ground.write_refused(local, raw, reasons.unmapped_write))
    observe.require(peer.judge(PEER_OFFSET, before))
    observe.require(ground.read_refused(raw, local, reasons.unmapped_read))
    if ground.local.read(LOCAL_OFFSET, PROBE_BYTES) == before[:PROBE_BYTES]:
        raise Refuted("the read was refused, and yet the peer's bytes arrived")
    observe.conclude(f"write and read of bus address {raw:#x} fault; the target is unchanged")


@gated
@pytest.mark.requirement("MAP-04")
def test_read_only_mapping(ground: Ground, reasons: Reasons, observe: Observer) -> None:
    """A peer reads through a read-only mapping, and cannot write through it."""
    size = ground.engine.bulk_bytes
    theirs = ground.fill_peer(THEIRS, size)
    ground.fill_local(MINE, size)
    local = ground.map_local()
    mapping = ground.mapper.map(ground.peer, PEER_OFFSET, size, write=False)
    observe.add(mapping.evidence)
    observe.require(ground.write_refused(local, mapping.iova, reasons.forbidden_write))
    observe.require(ground.peer.judge(PEER_OFFSET, theirs))
    observe.require(ground.deliver_to_local(mapping.iova, local, theirs))
    # Once the read-only translation is cached, QEMU refuses a write without recording a fault
    # (hw/i386/intel_iommu.c, a hit in the IOTLB skips the walk): only the bytes can tell.
    ground.fill_local(MINE, size)
    ground.engine.copy(local, mapping.iova, PROBE_BYTES)
    observe.require(ground.peer.judge(PEER_OFFSET, theirs))
    observe.conclude("the peer's read works, its write faults, the bytes are unchanged")


@gated
@pytest.mark.requirement("MAP-05")
def test_beyond_the_width(
    rack: LiveRack, pair: Pair, ground: Ground, reasons: Reasons, observe: Observer
) -> None:
    """An address that the IOMMU has no bits for is refused as such."""
    width = rack.topology.nodes[pair.node].iommu.aw_bits
    ground.fill_local(MINE, PROBE_BYTES)
    address = (1 << width) + ground.mapper.hole()
    observe.require(ground.write_refused(ground.map_local(), address, reasons.beyond_width))
    observe.conclude(f"{address:#x} is beyond {width} bits and faults")


@gated
@pytest.mark.requirement("MAP-06")
def test_unmapped_after_use(each_ground: Ground, reasons: Reasons, observe: Observer) -> None:
    """After the unmap the very next DMA faults, at the first, a middle and the last page."""
    ground, size = each_ground, max(each_ground.engine.bulk_bytes, 3 * PAGE_BYTES)
    mine = ground.fill_local(MINE, ground.engine.bulk_bytes)
    local = ground.map_local()
    mapping = ground.mapper.map(ground.peer, PEER_OFFSET, size)
    observe.add(mapping.evidence)
    observe.require(ground.deliver_to_peer(local, mapping.iova, mine))
    before = ground.fill_peer(THEIRS, size)
    ground.mapper.unmap(mapping)
    for offset in (0, size // 2 & -PAGE_BYTES, size - PAGE_BYTES):
        observe.require(ground.write_refused(local, mapping.iova + offset, reasons.unmapped_write))
    observe.require(ground.peer.judge(PEER_OFFSET, before))
    observe.conclude("every page of the old mapping faults at once; the target is unchanged")


@gated
@pytest.mark.requirement("MAP-09")
def test_doorbell_rung_by_a_peer(
    rack: LiveRack, doorbell: Doorbell, mutation: Mutation, observe: Observer
) -> None:
    """One register page is mapped: a peer rings it, an interrupt comes, the next is closed."""
    iommu = rack.topology.nodes[doorbell.node].iommu
    bench = shared_bench(rack, doorbell.node, mutation, doorbell)
    engine = bench.engine(doorbell.requester)
    page = DoorbellPage.of(bench, doorbell.page)
    mapping = bench.mapper.map(page.registers, page.layout.page, PAGE_BYTES)
    observe.add(mapping.evidence)
    try:
        value = 0x5A01
        with bench.watch() as watch:
            engine.write32(mapping.iova + page.layout.ring, value)
        observe.require(judge_no_fault(watch.window))
        observe.require(page.judge_rung(value))
        page.acknowledge()

        before = page.status()
        beyond = mapping.iova + PAGE_BYTES + page.layout.ring
        observe.require(page.ring_refused(engine, beyond, reasons_of(iommu).unmapped_write))
        observe.require(page.judge_silent(before))
    finally:
        bench.clean()
    observe.conclude("the ring is seen and its interrupt arrives; the page after it is closed")


@gated
@pytest.mark.requirement("MAP-10")
def test_scatter_list(each_ground: Ground, observe: Observer) -> None:
    """Pieces scattered in the BAR, contiguous for the device: byte-exact both ways."""
    ground = each_ground
    peer, page = ground.peer, PAGE_BYTES
    # Pieces of 2 MiB, then single pages; in a small BAR pieces of 64 KiB. Large ones behind single
    # pages would not be aligned for the device: 512 entries instead of one, each told to each
    # device, and most of what the whole suite costs the models.
    chunk = CHUNK_BYTES if peer.size_bytes >= 4 * CHUNK_BYTES else 64 << 10
    chunks = [
        Chunk(3 * chunk, chunk),
        Chunk(chunk, chunk),
        Chunk(7 * page, page),
        Chunk(3 * page, page),
        Chunk(5 * page, page),
    ]
    mappings = ground.mapper.map_scattered(peer, chunks)
    observe.add(*(mapping.evidence for mapping in mappings))
    local = ground.map_local()
    # What is copied spans each border: between the two large ones, and from there to the last page.
    edge = 2 * page if ground.engine.bulk_bytes > page else 512
    pieces = [
        Chunk(chunks[0].offset + chunk - edge, edge),
        Chunk(chunks[1].offset, edge),
        Chunk(chunks[1].offset + chunk - edge, edge),
        *chunks[2:],
    ]
    size = sum(piece.size_bytes for piece in pieces)
    # (at the device, beside the local bytes, so many)
    runs = [
        (mappings[1].iova - edge, 0, 2 * edge),
        (mappings[2].iova - edge, 2 * edge, size - 2 * edge),
    ]

    mine = ground.fill_local(MINE, size)
    for piece in pieces:
        peer.fill(piece.offset, piece.size_bytes, THEIRS)
    with ground.bench.watch() as watch:
        for iova, done, length in runs:
            ground.engine.copy(local + done, iova, length)
    observe.require(judge_no_fault(watch.window))
    done = 0
    for piece in pieces:
        observe.require(peer.judge(piece.offset, mine[done : done + piece.size_bytes]))
        done += piece.size_bytes

    gathered = b"".join(
        peer.fill(piece.offset, piece.size_bytes, FRESH + number)
        for number, piece in enumerate(pieces)
    )
    for iova, done, length in runs:
        expected = gathered[done : done + length]
        observe.require(ground.deliver_to_local(iova, local, expected, at=done))
    observe.conclude(f"{size} bytes over {len(chunks)} pieces, scattered and gathered")


@gated
@pytest.mark.requirement("TOPO-15")
def test_success_is_judged_at_the_destination(each_ground: Ground, observe: Observer) -> None:
    """A device says "completed" of bytes that went elsewhere, or nowhere: the judge says FAIL."""
    ground, size = each_ground, PAGE_BYTES
    peer = ground.peer
    ground.fill_local(MINE, size)
    local = ground.map_local()
    here = ground.mapper.map(peer, PEER_OFFSET, size)

    mine = ground.fill_local(MINE, size)
    ground.fill_peer(THEIRS, size)
    observe.require(ground.deliver_to_peer(local, here.iova, mine))

    elsewhere = ground.mapper.map(peer, PEER_OFFSET + size, size)
    # QEMU's devices are not told that a write was refused. A model is, so that its writes have to
    # be lost otherwise for it to claim success.
    witness = ground.engine.witness
    nowhere: Any = nullcontext()
    lost_at = ground.mapper.hole()
    if witness is not None:
        nowhere, lost_at = witness.lost_writes(here.iova, size), here.iova
    lies = (("elsewhere", elsewhere.iova, nullcontext()), ("nowhere", lost_at, nowhere))
    for name, address, lost in lies:
        fresh = ground.fill_local(FRESH, size)
        ground.fill_peer(THEIRS, size)
        with lost:
            judgement = ground.deliver_to_peer(local, address, fresh)
        observe.add(*judgement.evidence)
        claims = [e for e in judgement.evidence if isinstance(e, Counter) and e.name == CLAIM]
        if not claims or claims[0].value != size:
            raise Refuted(f"the device did not claim success for bytes that went {name}")
        if judgement.holds:
            raise Refuted(f"the bytes went {name}, the device said completed, and it was believed")
    observe.conclude("a completion status over bytes elsewhere or nowhere is judged a failure")


@gated
@pytest.mark.requirement("FLT-05")
def test_fault_storm(ground: Ground, reasons: Reasons, observe: Observer) -> None:
    """More faults than can be recorded: the lost ones are counted, and the machine goes on."""
    engine = ground.engine
    count = STORM_FAULTS.get(engine.function.kind, DEFAULT_STORM_FAULTS)
    hole = ground.mapper.hole(count * PAGE_BYTES)
    with ground.bench.watch() as watch:
        engine.storm(hole, count, Access.WRITE)
    window = watch.window
    if not window.machine_watched and not (window.suppressed or window.overflow):
        raise CapabilityMissing("a count of lost faults: this QEMU does not trace them")
    observe.require(
        judge_storm(
            window,
            requester=engine.requester,
            address=hole,
            access=Access.WRITE,
            reasons=reasons.unmapped_write,
            count=count,
        )
    )
    assert ground.bench.node.agent.call("system.info")["kernel"], "the guest answers"

    mine = ground.fill_local(MINE, engine.bulk_bytes)
    mapping = ground.mapper.map(ground.peer, PEER_OFFSET, engine.bulk_bytes)
    observe.require(ground.deliver_to_peer(ground.map_local(), mapping.iova, mine))
    observe.conclude(
        f"{window.unrecorded} of {count} faults were lost to the guest's log, and are counted;"
        " the next copy is right"
    )


@gated
@pytest.mark.boots("scalable", when=has_pairs)
@pytest.mark.requirement("MAP-08")
def test_scalable_mode(variant: Variant, pair: Pair, mutation: Mutation, observe: Observer) -> None:
    """First-stage tables: the same copies work, and what is refused has its own reason codes."""
    other = variant("scalable")
    try:
        bench = shared_bench(other, pair.node, mutation)
    except LaunchError as error:
        if "intel-iommu" in error.output and "not found" in error.output:
            raise CapabilityMissing("scalable mode with first-stage tables in this QEMU") from error
        raise
    ground = Ground.of(bench, pair)
    size = ground.engine.bulk_bytes
    mine = ground.fill_local(MINE, size)
    local = ground.map_local()
    mapping = ground.mapper.map(ground.peer, PEER_OFFSET, size)
    observe.require(ground.deliver_to_peer(local, mapping.iova, mine))

    theirs = ground.fill_peer(THEIRS, size)
    read_only = ground.mapper.map(ground.peer, PEER_OFFSET, size, write=False)
    refusals = (
        (ground.mapper.hole(), FIRST_STAGE.unmapped_write),
        (read_only.iova, FIRST_STAGE.forbidden_write),
        (1 << 48, FIRST_STAGE.beyond_width),
    )
    for address, codes in refusals:
        observe.require(ground.write_refused(local, address, codes))
    observe.require(ground.peer.judge(PEER_OFFSET, theirs))
    bench.clean()
    observe.conclude("copies work; refusals have the reasons 0x71, 0x85 and 0x80")
