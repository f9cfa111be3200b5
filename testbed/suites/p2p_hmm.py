# SPDX-License-Identifier: Apache-2.0
"""Suite ``p2p-hmm``: a process's memory in one GPU, looked at by another device (HMM).

The pages are the kernel's: MEMORY_DEVICE_PRIVATE, migrated by ``migrate_vma_*()``; what another
device is given is found by ``hmm_range_fault()`` and mapped by ``hmm_dma_map_pfn()`` (mm/hmm.c).
Drivers of both ends are one module of ours, ``hmm_peer``.

A stand-in: no stock kernel leaves another owner's page where it is. The proposed callback, by
which the owner names a peer-to-peer page of the same bytes (dev_pagemap_ops, "HMM API to enable P2P
DMA for device private pages", 2024 and 2025), is between the module's own halves; the rule of
paths, the mapping, migration and notification are the kernel's. The CPU moves pages into video
memory and out of it, where a driver would use a copy engine.
"""

from __future__ import annotations

import pytest

from testbed.instruments.dmabuf import judge_errno
from testbed.instruments.observer import Observer, Refuted
from testbed.instruments.private_memory import (
    FILLED,
    PAGES,
    PEER,
    STALE,
    STOCK,
    WRITTEN,
    Mirror,
    ProcessMemory,
)
from testbed.suites.dmabuf_fixtures import has_buffers
from testbed.suites.hmm_fixtures import ArrangePrivate
from testbed.topology.oracle import Route

pytest_plugins = ["testbed.suites.hmm_fixtures"]
pytestmark = [pytest.mark.boots(when=has_buffers), pytest.mark.without_disks]

LAST = PAGES - 1


def looked(mirror: Mirror, observe: Observer) -> Mirror:
    """The device has been given something for every page."""
    observe.add(*mirror.evidence)
    observe.require(judge_errno(f"{mirror.device.name} looks", mirror.errno, 0))
    return mirror


def migrated_and_used(memory: ProcessMemory, mirror: Mirror, observe: Observer) -> None:
    """All pages have come to system memory; the device uses them there, and nowhere else."""
    observe.require(memory.judge_in_system())
    observe.require(mirror.judge_kind("system"))
    for page, offset in memory.offsets.items():
        memory.place.poke(offset, memory.pattern(STALE, page))
    for page in (0, LAST):
        observe.require(mirror.deliver_system(page))
    for page, offset in memory.offsets.items():
        observe.require(memory.place.judge_video(offset, memory.pattern(STALE, page)))


@pytest.mark.requirement("HMM-02")
def test_another_owners_pages_over_pcie(arrange_private: ArrangePrivate, observe: Observer) -> None:
    """There is a way: the pages stay in video memory, and the device reaches them by it."""
    place = arrange_private(path=True)
    memory = place.memory()
    observe.require(memory.take())
    mirror = looked(memory.look(PEER), observe)
    observe.require(memory.judge_in_video())
    observe.require(mirror.judge_peers())
    path = "peer" if place.pair.route is Route.SWITCH else "iommu"
    for page in (0, LAST):
        observe.require(mirror.deliver_video(page, path))
    observe.require(memory.judge_in_video())
    # What the device wrote is the process's: its touch brings a page back, and the device is told.
    for page in range(PAGES):
        place.poke(memory.offsets[page], memory.pattern(WRITTEN, page))
        if memory.read(page) != memory.pattern(WRITTEN, page):
            raise Refuted(f"the process reads other bytes in page {page} than the device wrote")
    observe.require(memory.judge_in_system())
    observe.require(mirror.judge_told())
    if place.by_iova:
        observe.require(mirror.refused(LAST))
    observe.conclude(f"{PAGES} pages left in place and used by {place.pair} by path '{path}'")


@pytest.mark.requirement("HMM-03")
def test_another_owners_pages_without_a_way(
    arrange_private: ArrangePrivate, observe: Observer
) -> None:
    """There is none: the pages migrate to system memory first, and are mapped there."""
    place = arrange_private(path=False)
    memory = place.memory()
    observe.require(memory.take())
    mirror = looked(memory.look(PEER), observe)
    migrated_and_used(memory, mirror, observe)
    observe.conclude(f"{PAGES} pages migrated, and used by {place.pair} in system memory")


@pytest.mark.requirement("HMM-04")
def test_whose_pages_they_are(arrange_private: ArrangePrivate, observe: Observer) -> None:
    """The owner's own device gets its memory's own pages; a device of another owner has them
    migrated, as stock kernels do it whatever way there is."""
    place = arrange_private(own=True)
    assert place.own_engine is not None
    memory = place.memory()
    observe.require(memory.take())
    own = looked(memory.look_as_owner(place.own_engine), observe)
    observe.require(memory.judge_in_video())
    observe.require(own.judge_kind("private"))
    for page in (0, LAST):
        if own.pages[page].address != memory.offsets[page]:
            raise Refuted(f"page {page} is not where the owner was told that it is")
        observe.require(own.deliver_video(page, "local"))
    # What the next device must find: each page its own bytes.
    for page, offset in memory.offsets.items():
        place.poke(offset, memory.pattern(FILLED, page))
    observe.require(memory.judge_in_video())
    other = looked(memory.look(STOCK), observe)
    migrated_and_used(memory, other, observe)
    observe.require(own.judge_told())
    observe.conclude("device pages for their own owner's engine, migration for another's")
