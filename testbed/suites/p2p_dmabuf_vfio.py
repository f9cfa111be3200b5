# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-dmabuf``, third part: the kernel's own exporter, ``VFIO_DEVICE_FEATURE_DMA_BUF``.

drivers/vfio/pci/vfio_pci_dmabuf.c of the guest's kernel exports a BAR of a device that VFIO owns;
our importer module is another device's driver. Nothing here exports by a module of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EINVAL, ENODEV, ENOTTY, EOPNOTSUPP

import pytest

from testbed.errors import CapabilityMissing
from testbed.instruments.dmabuf import (
    BUFFER_BYTES,
    DYNAMIC,
    EXPORTER,
    PEER,
    PINNED,
    REVOCABLE,
    STATIC,
    Buffer,
    Exchange,
    Import,
    Range,
    judge_errno,
)
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer, Refuted
from testbed.results.judging import PAGE_BYTES
from testbed.suites.dmabuf_fixtures import ArrangeBuffers, has_buffers
from testbed.suites.p2p_dmabuf import both_ends, imported, two_ranges_are_mapped

pytest_plugins = ["testbed.suites.dmabuf_fixtures"]
pytestmark = [pytest.mark.boots(when=has_buffers), pytest.mark.without_disks]


@dataclass
class VfioExporter:
    """The exporter's function in a VFIO container, and a buffer of its memory."""

    exchange: Exchange
    container: int
    buffer: Buffer
    is_open: bool = True

    def decode(self, *, on: bool) -> None:
        """Turn its memory decoding on or off."""
        if self.exchange.mutation is Mutation.SKIP_REVOKE:
            return
        device = self.exchange.pair.exporter.bdf
        self.exchange.call("vfio_decode", container=self.container, device=device, on=on)

    def reset(self) -> None:
        """Reset the function alone; CapabilityMissing if it cannot be."""
        if self.exchange.mutation is Mutation.SKIP_REVOKE:
            return
        exporter = self.exchange.pair.exporter
        answer = self.exchange.call("vfio_reset", container=self.container, device=exporter.bdf)
        if not answer["reset"]:
            raise CapabilityMissing(f"a reset of {exporter.name} alone")

    def close(self) -> None:
        """Give the device back to the kernel. Idempotent."""
        if self.is_open:
            self.is_open = self.exchange.vfio = False
            self.exchange.node.agent.call("vfio.close", container=self.container)


@contextmanager
def by_vfio(arrange_buffers: ArrangeBuffers) -> Iterator[VfioExporter]:
    """The exporter is VFIO's inside the block; CapabilityMissing where the kernel's VFIO cannot."""
    exchange = arrange_buffers(vfio=True)
    pair, call = exchange.pair, exchange.node.agent.call
    # Asked for before VFIO has the group: to give a group of many devices back takes seconds.
    found = call("pci.tree", only=[pair.exporter.bdf, pair.importer.bdf])["devices"]
    groups = {device["iommu_group"] for device in found}
    if len(groups) == 1 and groups != {None}:
        raise CapabilityMissing(f"an IOMMU group of its own for {pair.importer.name}")
    opened = call("vfio.open", devices=[pair.exporter.bdf])
    vfio = VfioExporter(exchange, opened["container"], Buffer(exchange, "", ENOTTY, ()))
    try:
        vfio.buffer = exchange.export_vfio(vfio.container)
        if vfio.buffer.errno in (ENOTTY, EOPNOTSUPP):
            raise CapabilityMissing("VFIO_DEVICE_FEATURE_DMA_BUF (CONFIG_VFIO_PCI_DMABUF)")
        yield vfio
    finally:
        if exchange.node.alive:
            vfio.close()


@pytest.mark.requirement("LIFE-01", "MAP-12")
def test_whom_vfio_lets_in(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """EOPNOTSUPP for importers that cannot be told of a revoke, and nothing for the CPU."""
    with by_vfio(arrange_buffers) as vfio:
        for manners in (STATIC, DYNAMIC, PEER, PINNED):
            refusal = vfio.buffer.attach(manners).errno
            observe.require(judge_errno(" ".join(manners) or "static", refusal, EOPNOTSUPP))
        pinned = vfio.buffer.attach((*REVOCABLE, "pinned"))
        observe.require(judge_errno("pinned, and revocable all the same", pinned.errno, 0))
        mapping = vfio.buffer.call("mmap", size_bytes=PAGE_BYTES)["errno"]
        observe.require(judge_errno("mmap of the dma-buf", mapping, EINVAL))
        flagged = vfio.exchange.export_vfio(vfio.container, flags=1).errno
        observe.require(judge_errno("export with flags", flagged, EINVAL))
        half = Range(0, PAGE_BYTES // 2)
        unaligned = vfio.exchange.export_vfio(vfio.container, half).errno
        observe.require(judge_errno("export of half a page", unaligned, EINVAL))
        importer = imported(vfio.buffer, observe)
        observe.require(judge_errno("vmap", importer.read(0, "vmap")[0], EINVAL, EOPNOTSUPP))
        both_ends(importer, observe)
    observe.conclude("VFIO's exporter lets in who can be told, and its bytes arrive")


@pytest.mark.requirement("LIFE-02", "LIFE-03")
@pytest.mark.parametrize("how", ["decode", "reset"])
def test_vfio_takes_it_back(arrange_buffers: ArrangeBuffers, observe: Observer, how: str) -> None:
    """Memory decoding off, or a reset: importers are told and let go, and may map again after."""
    with by_vfio(arrange_buffers) as vfio:
        importer = imported(vfio.buffer, observe)
        both_ends(importer, observe)
        if how == "decode":
            vfio.decode(on=False)
        else:
            vfio.reset()
        let_go(importer, observe)
        if how == "decode":
            observe.require(judge_errno("map, decoding off", importer.map().errno, ENODEV))
            another = vfio.buffer.attach(REVOCABLE).errno
            observe.require(judge_errno("attach, decoding off", another, ENODEV))
            vfio.decode(on=True)
        observe.require(judge_errno("map again", importer.map().errno, 0))
        both_ends(importer, observe)
    observe.conclude(f"{how}: told, unmapped, and mapped again after it")


@pytest.mark.requirement("LIFE-02", "LIFE-03", "LIFE-04")
def test_vfio_closes_the_device(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """The user of the device ends: importers are told, for good; what they try by then faults."""
    with by_vfio(arrange_buffers) as vfio:
        exchange = vfio.exchange
        importer = imported(vfio.buffer, observe)
        both_ends(importer, observe)
        vfio.close()
        let_go(importer, observe)
        observe.require(judge_errno("map after the close", importer.map().errno, ENODEV))
        if exchange.by_iova:
            # So that its memory can be looked at: a function without a driver decodes nothing.
            exchange.call("bind", device=exchange.pair.exporter.bdf, module=EXPORTER)
            observe.require(importer.refused())
    observe.conclude("told, unmapped, ENODEV, and by the old address nothing is reached")


@pytest.mark.requirement("MAP-15")
def test_two_ranges_of_vfios(arrange_buffers: ArrangeBuffers, observe: Observer) -> None:
    """As MAP-15 with our exporter: one buffer of two ranges."""
    with by_vfio(arrange_buffers) as vfio:
        ranges = (Range(BUFFER_BYTES, BUFFER_BYTES), Range(4 * BUFFER_BYTES, BUFFER_BYTES))
        buffer = vfio.exchange.export_vfio(vfio.container, *ranges)
        observe.require(judge_errno("export", buffer.errno, 0))
        importer = buffer.attach(REVOCABLE)
        mapped = importer.map()
        observe.add(*mapped.evidence)
        observe.require(two_ranges_are_mapped(mapped))
        both_ends(importer, observe)
    observe.conclude("both ranges are reachable")


def let_go(importer: Import, observe: Observer) -> None:
    """It was told, and has unmapped."""
    state = importer.command("state")
    observe.note(f"told {state['invalidated']} times")
    if not state["invalidated"] or state["mapped"]:
        raise Refuted(f"told {state['invalidated']} times, and still mapped: {state['mapped']}")
