# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-dmabuf``: dma-bufs of video memory, as the guest's own kernel maps them for a peer.

The exporter and the importer are modules of ours (guest_agent/kmod), and what lies between them is
the kernel's: drivers/dma-buf, drivers/pci/p2pdma.c, drivers/iommu. Three of the exporter's modes
make well-known mistakes; each must be refuted by the same judgement that the right ones pass, under
the name of the requirement that it breaks.
"""

from __future__ import annotations

from contextlib import suppress
from errno import EADDRINUSE, EINVAL, EOPNOTSUPP

import pytest

from testbed.errors import CapabilityMissing, InputError
from testbed.instruments.dmabuf import (
    BUFFER_BYTES,
    DYNAMIC,
    PEER,
    REVOCABLE,
    STATIC,
    Buffer,
    Exchange,
    Import,
    Mapped,
    Range,
    errno_word,
    judge_errno,
)
from testbed.instruments.observer import Observer, Refuted
from testbed.results.evidence import Counter
from testbed.results.judging import PAGE_BYTES, Judgement, all_of
from testbed.suites.dmabuf_fixtures import (
    THROUGH_HOST_BRIDGE,
    ArrangeBuffers,
    has_buffers,
    with_buffers,
)
from testbed.suites.kernel_fixtures import kernel_module
from testbed.suites.p2p_kernel import PROBE
from testbed.topology.model import Topology, with_overrides
from testbed.topology.oracle import Route

pytest_plugins = ["testbed.suites.dmabuf_fixtures"]
pytestmark = [pytest.mark.boots(when=has_buffers), pytest.mark.without_disks]

GIB = 1 << 30
LARGE_VRAM = "16G"  # memory that is not used costs nothing
LARGE_BYTES = (4 * GIB, 8 * GIB + PAGE_BYTES)
NARROW_BITS, WIDE_BITS = 32, 64
LAST_PAGE = BUFFER_BYTES - PAGE_BYTES
RIGHT_MODES = ("pages", "provider")

# What is known of the kernel's failures (drivers/dma-buf/dma-buf-mapping.c of 7.2; with pages the
# same was seen): a bus address is taken as it is, and dma_iova_link() has offset 0 for each range.
NOT_HELD_AGAINST_MASK = "Linux does not hold a peer's bus address against the DMA mask"
LINKED_TWICE = "dma_buf_phys_vec_to_sgt() links each range at offset 0 of the IOVA"


def rack_variants(topology: Topology) -> dict[str, Topology]:
    """The same rack without an IOMMU, with large video memories, and with a lazy IOMMU.

    For a device outside QEMU there is none: its IOMMU has to tell it of each mapping at once.
    """
    variants = {
        "iommu-off": with_overrides(topology, iommu_mode="off"),
        "large-vram": with_overrides(topology, vram=LARGE_VRAM),
    }
    with suppress(InputError):
        variants["lazy"] = with_overrides(topology, iommu_mode="lazy", engine="edu")
    return variants


def imported(buffer: Buffer, observe: Observer, **options: int) -> Import:
    """The best of importers, attached and mapped."""
    observe.require(judge_errno("export", buffer.errno, 0))
    importer = buffer.attach(REVOCABLE, **options)
    observe.require(judge_errno("attach", importer.errno, 0))
    mapped = importer.map()
    observe.add(*mapped.evidence)
    observe.require(judge_errno("map", mapped.errno, 0))
    return importer


def both_ends(importer: Import, observe: Observer) -> None:
    """The device reaches the first and the last page, both ways."""
    for offset in (0, importer.buffer.size_bytes - PAGE_BYTES):
        observe.require(importer.deliver(offset))


def no_cpu_access(buffer: Buffer) -> Judgement:
    """Is the CPU refused: a mapping by a process, one by the kernel, and who cannot do without?"""
    importer = buffer.attach(REVOCABLE)
    return all_of(
        judge_errno(
            "mmap of the dma-buf", buffer.call("mmap", size_bytes=PAGE_BYTES)["errno"], EINVAL
        ),
        judge_errno("vmap", importer.read(0, "vmap")[0], EINVAL, EOPNOTSUPP),
        judge_errno("attach without peer2peer", buffer.attach(DYNAMIC).errno, EOPNOTSUPP),
        judge_errno("static attach", buffer.attach(STATIC).errno, EOPNOTSUPP),
    )


def by_the_kernels_rule(exchange: Exchange, mode: str, distance: int | None) -> Judgement:
    """Does an importer get a list of peer addresses if and only if it accepts them, and the kernel
    knows a way?"""
    steps = []
    for manners in (STATIC, DYNAMIC, PEER):
        buffer = exchange.export(mode)
        importer = buffer.attach(manners)
        error = importer.errno or importer.map().errno
        accepts = "peer2peer" in manners or mode == "pages"  # pages need no acceptance
        words = f"{mode}, {' '.join(manners) or 'static'}, distance {distance}"
        if accepts and distance is not None:
            steps.append(judge_errno(words, error, 0))
        else:
            steps.append(judge_errno(words, error, EOPNOTSUPP, EINVAL))
        importer.close()
        buffer.call("close")
    return all_of(*steps)


def caught(judgement: Judgement, observe: Observer, what: str) -> None:
    """A wrong exporter must be refuted."""
    observe.add(*judgement.evidence)
    if judgement.holds:
        raise Refuted(f"{what} was taken for right: {judgement.reason}")
    observe.conclude(f"{what} is caught: {judgement.reason}")


@pytest.mark.requirement("MAP-11")
def test_a_list_without_pages(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """Who needs the CPU refuses a list without pages, and a device works with it."""
    exchange = arrange_buffers()
    for mode in ("provider", "null-page"):
        importer = imported(exchange.export(mode), observe)
        if any(entry.has_page for entry in importer.mapped.entries):
            raise Refuted(f"{mode}: the list has pages")
        refusal = importer.write(0, bytes(PAGE_BYTES), "pages")
        observe.require(judge_errno(f"{mode}: a copy by the CPU", refusal, EOPNOTSUPP))
        both_ends(importer, observe)
    with_pages = imported(exchange.export("pages"), observe)
    copied = with_pages.write(0, bytes(PAGE_BYTES), "pages")
    observe.require(judge_errno("pages: a copy by the CPU", copied, 0))
    at = with_pages.buffer.bar_offset(0)
    observe.require(exchange.judge_page(at, bytes(PAGE_BYTES)))
    both_ends(with_pages, observe)
    observe.conclude("without pages the CPU's copy is refused and the device's works")


@pytest.mark.requirement("MAP-12")
def test_no_cpu_access(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """A buffer for devices only: mmap, vmap and importers that need the CPU are refused."""
    exchange = arrange_buffers()
    buffer = exchange.export("provider")
    observe.require(no_cpu_access(buffer))
    both_ends(imported(buffer, observe), observe)
    for_all = exchange.export("pages").call("mmap", size_bytes=PAGE_BYTES)
    observe.require(judge_errno("mmap of a buffer with pages", for_all["errno"], 0))
    observe.conclude("the CPU is refused in four ways, the device reaches the buffer")


@pytest.mark.requirement("MAP-12")
def test_an_exporter_that_forgets_to_refuse_the_cpu(
    arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """Wrong on purpose: NULL pages, and the CPU is let in all the same."""
    buffer = arrange_buffers(allowed=False).export("null-page")
    caught(no_cpu_access(buffer), observe, "the exporter without CPU refusal")


@pytest.mark.requirement("MAP-03")
def test_an_exporter_that_hands_out_the_bus_address(
    arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """Wrong on purpose, as habanalabs v3: the BAR's address, which the IOMMU refuses."""
    exchange = arrange_buffers(THROUGH_HOST_BRIDGE, allowed=False)
    importer = imported(exchange.export("bus-address"), observe)
    bus = exchange.bus_address + importer.buffer.bar_offset(0)
    if importer.mapped.address(0) != bus:
        raise Refuted(f"the exporter handed out {importer.mapped.address(0):#x}, not {bus:#x}")
    wrong = importer.deliver()
    observe.require(importer.refused(how="dma"))
    caught(wrong, observe, "the exporter of a bus address")


@pytest.mark.requirement("NEG-10")
def test_peer_addresses_need_acceptance_and_a_path(
    arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """A list of peer addresses goes to importers that accept one, where the kernel knows a way."""
    exchange = arrange_buffers(allowed=False)
    distance = kernel_distance(exchange)
    observe.note(f"the kernel's distance: {distance}")
    for mode in RIGHT_MODES:
        observe.require(by_the_kernels_rule(exchange, mode, distance))
    if distance is not None:
        both_ends(imported(exchange.export("provider"), observe), observe)
    observe.conclude(f"distance {distance}: lists of peer addresses as the kernel's rule has it")


@pytest.mark.requirement("NEG-10")
def test_an_exporter_that_does_not_ask_p2pdma(
    arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """Wrong on purpose: mapped for anyone, whatever the path and whoever it is."""
    exchange = arrange_buffers(allowed=False)
    judgement = by_the_kernels_rule(exchange, "no-check", kernel_distance(exchange))
    caught(judgement, observe, "the exporter that does not ask p2pdma")


@pytest.mark.requirement("MAP-13")
def test_a_mask_that_translation_makes_wide_enough(
    arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """With an IOMMU a device of 32 bits reaches a BAR beyond 4 GiB: by an address below."""
    exchange = arrange_buffers(THROUGH_HOST_BRIDGE)
    _need_far_bar(exchange)
    importer = imported(exchange.export("provider"), observe, mask=NARROW_BITS)
    if importer.mapped.address(LAST_PAGE) + PAGE_BYTES > 1 << NARROW_BITS:
        raise Refuted(f"{importer.mapped.address(LAST_PAGE):#x} does not fit {NARROW_BITS} bits")
    both_ends(importer, observe)
    observe.conclude(f"a BAR at {exchange.bus_address:#x} is reached by {NARROW_BITS} bits")


@pytest.mark.requirement("MAP-13")
def test_a_mask_too_narrow_for_the_bar(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """Without an IOMMU the mapping fails; no address is cut to what fits."""
    exchange = arrange_buffers(THROUGH_HOST_BRIDGE, name="iommu-off")
    refused_to_narrow(exchange, observe)


# Without an IOMMU Linux has no switch redirect, so that each has its own way.
@pytest.mark.boots("iommu-off", when=with_buffers(Route.SWITCH, Route.REDIRECTED))
@pytest.mark.requirement("MAP-13")
def test_a_mask_too_narrow_for_a_bus_address(
    arrange_buffers: ArrangeBuffers, observe: Observer
) -> None:
    """The same below a switch, where the kernel hands out the BAR's bus address."""
    exchange = arrange_buffers((Route.SWITCH,), name="iommu-off")
    refused_to_narrow(exchange, observe)


@pytest.mark.boots("large-vram", when=with_buffers(Route.SWITCH))
@pytest.mark.requirement("MAP-14")
def test_exports_beyond_32_bits(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """4 GiB, and 8 GiB and a page: an entry's length has 32 bits, the list covers it all."""
    exchange = arrange_buffers(name="large-vram")
    for size in LARGE_BYTES:
        importer = imported(exchange.export("provider", Range(0, size)), observe)
        observe.add(Counter("entries", len(importer.mapped.entries)))
        if importer.mapped.size_bytes != size:
            raise Refuted(f"{size:#x} bytes exported, {importer.mapped.size_bytes:#x} mapped")
        both_ends(importer, observe)
        importer.close()
    observe.conclude("lengths and last pages are right, 4 GiB and 8 GiB + 4 KiB")


@pytest.mark.requirement("MAP-15")
def test_two_ranges_in_one_export(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """One buffer of two ranges, which a device reaches through the host bridge and the IOMMU."""
    exchange = arrange_buffers(THROUGH_HOST_BRIDGE)
    ranges = (Range(BUFFER_BYTES, BUFFER_BYTES), Range(4 * BUFFER_BYTES, BUFFER_BYTES))
    # Mapped one by one, which the kernel can: so the machine and this test can show two ranges.
    one_by_one = imported(exchange.export("no-check", *ranges), observe)
    both_ends(one_by_one, observe)
    one_by_one.close()
    buffer = exchange.export("provider", *ranges)
    importer = buffer.attach(REVOCABLE)
    observe.require(judge_errno("attach", importer.errno, 0))
    mapped = importer.map()
    observe.add(*mapped.evidence)
    observe.require(two_ranges_are_mapped(mapped))
    for offset in (0, BUFFER_BYTES - PAGE_BYTES, BUFFER_BYTES, 2 * BUFFER_BYTES - PAGE_BYTES):
        observe.require(importer.deliver(offset))
    observe.conclude("both ranges are reachable, to their last pages")


def refused_to_narrow(exchange: Exchange, observe: Observer) -> None:
    """A device of 32 bits is refused a BAR beyond 4 GiB, one of 64 reaches it."""
    _need_far_bar(exchange)
    for mode in RIGHT_MODES:
        buffer = exchange.export(mode)
        importer = buffer.attach(REVOCABLE, mask=NARROW_BITS)
        observe.require(judge_errno("attach", importer.errno, 0))
        mapped = importer.map()
        observe.add(*mapped.evidence)
        if not mapped.errno:
            handed = f"{mapped.entries[0].address:#x}"
            why = f": {NOT_HELD_AGAINST_MASK}" if exchange.pair.route is Route.SWITCH else ""
            raise Refuted(f"{mode}: a device of {NARROW_BITS} bits was given {handed}{why}")
        observe.note(f"{mode}: map: {errno_word(mapped.errno)}")
        importer.close()
        both_ends(imported(buffer, observe, mask=WIDE_BITS), observe)
    observe.conclude(f"{NARROW_BITS} bits are refused, {WIDE_BITS} reach it")


def two_ranges_are_mapped(mapped: Mapped) -> Judgement:
    """Did the kernel map a buffer of two ranges? If not, with what is known of why."""
    judgement = judge_errno("map of two ranges", mapped.errno, 0)
    if mapped.errno == EADDRINUSE:
        return Judgement(False, f"{judgement.reason}: {LINKED_TWICE}", judgement.evidence)
    return judgement


def kernel_distance(exchange: Exchange) -> int | None:
    """The kernel's own word about the pair; None: no way."""
    pair = exchange.pair
    with kernel_module(exchange.node, PROBE):
        params = {"provider": pair.exporter.bdf, "clients": [pair.importer.bdf]}
        answer = exchange.node.agent.call("p2p.distance", **params)
    found: int | None = answer[pair.importer.bdf]
    return found


def _need_far_bar(exchange: Exchange) -> None:
    if exchange.bus_address >> NARROW_BITS == 0:
        raise CapabilityMissing(
            f"a BAR beyond 4 GiB: {exchange.pair.exporter.name} is at {exchange.bus_address:#x}"
        )
