# SPDX-License-Identifier: Apache-2.0
"""The table of mappings: overlaps, splits, permissions, and agreement with a page-by-page model."""

from __future__ import annotations

import errno
import os
import random

import pytest

from testbed.models.dma import DmaTable, MappingRefused
from testbed.models.memory import MemoryCache, NotMappable, SharedMemory

PAGE = 4096


@pytest.fixture
def memory() -> SharedMemory:
    memory = SharedMemory.create(64 * PAGE, name="ram")
    for page in range(64):
        memory.view[page * PAGE] = page
    return memory


def put(table: DmaTable, page: int, pages: int, memory: SharedMemory | None, at: int) -> None:
    table.map(page * PAGE, pages * PAGE, memory, at * PAGE, readable=True, writable=True)


def first_byte(table: DmaTable, page: int) -> int | None:
    reach = table.reach(page * PAGE, PAGE, write=False)
    return reach.view[0] if reach.view is not None else None


def test_pages_that_continue_each_other_become_one(memory: SharedMemory) -> None:
    table = DmaTable()
    put(table, 0, 1, memory, 0)
    put(table, 2, 1, memory, 2)
    put(table, 1, 1, memory, 1)
    assert len(table) == 1
    reach = table.reach(0, 3 * PAGE, write=True)
    assert reach.size_bytes == 3 * PAGE
    assert reach.view is not None
    assert [reach.view[page * PAGE] for page in range(3)] == [0, 1, 2]


def test_other_memory_or_rights_stay_apart(memory: SharedMemory) -> None:
    table = DmaTable()
    put(table, 0, 1, memory, 0)
    put(table, 1, 1, memory, 5)  # not what follows in the file
    table.map(2 * PAGE, PAGE, memory, 6 * PAGE, readable=True, writable=False)
    put(table, 3, 1, SharedMemory.create(PAGE, name="other"), 0)
    assert len(table) == 4


@pytest.mark.parametrize(("page", "pages"), [(4, 1), (3, 2), (5, 2), (0, 16), (2, 4)])
def test_overlaps_are_refused(memory: SharedMemory, page: int, pages: int) -> None:
    table = DmaTable()
    put(table, 4, 2, memory, 0)
    with pytest.raises(MappingRefused) as refused:
        put(table, page, pages, memory, 8)
    assert refused.value.number == errno.EEXIST
    assert len(table) == 1


@pytest.mark.parametrize(
    ("address", "size", "offset"),
    [
        (0, 0, 0),
        (1, PAGE, 0),
        (0, PAGE + 1, 0),
        (0, PAGE, 1),
        (0, 65 * PAGE, 0),
        (0, PAGE, 64 * PAGE),
        ((1 << 64) - PAGE, 2 * PAGE, 0),
    ],
)
def test_what_is_no_range_of_the_memory_is_refused(
    memory: SharedMemory, address: int, size: int, offset: int
) -> None:
    with pytest.raises(MappingRefused) as refused:
        DmaTable().map(address, size, memory, offset, readable=True, writable=True)
    assert refused.value.number == errno.EINVAL


def test_the_number_of_mappings_is_bounded(memory: SharedMemory) -> None:
    table = DmaTable(limit=3)
    for page in (0, 2, 4):
        put(table, page, 1, memory, page)
    with pytest.raises(MappingRefused) as refused:
        put(table, 6, 1, memory, 7)
    assert refused.value.number == errno.ENOSPC
    put(table, 1, 1, memory, 1)  # joins what is there: no new one


def test_unmap_cuts_a_hole(memory: SharedMemory) -> None:
    table = DmaTable()
    put(table, 0, 8, memory, 0)
    assert table.unmap(3 * PAGE, 2 * PAGE) == 2 * PAGE
    assert [first_byte(table, page) for page in range(9)] == [
        0, 1, 2, None, None, 5, 6, 7, None,
    ]  # fmt: skip


def test_unmap_of_nothing_and_of_all(memory: SharedMemory) -> None:
    table = DmaTable()
    assert table.unmap(0, 1 << 63) == 0
    put(table, 1, 1, memory, 0)
    put(table, 5, 1, memory, 5)
    assert table.unmap(0, 1 << 64) == 2 * PAGE
    assert len(table) == 0


def test_rights_are_honoured(memory: SharedMemory) -> None:
    table = DmaTable()
    table.map(0, PAGE, memory, 0, readable=True, writable=False)
    assert table.reach(0, 16, write=False).view is not None
    assert table.reach(0, 16, write=True).view is None


def test_a_gap_ends_where_the_next_mapping_begins(memory: SharedMemory) -> None:
    table = DmaTable()
    put(table, 2, 1, memory, 0)
    reach = table.reach(0, 1 << 40, write=False)
    assert (reach.size_bytes, reach.mapping, reach.view) == (2 * PAGE, None, None)


def test_it_agrees_with_a_table_of_pages() -> None:
    memory = SharedMemory.create(64 * PAGE, name="ram")
    for page in range(64):
        memory.view[page * PAGE] = page
    rng = random.Random(4)  # noqa: S311 - the same every time
    table = DmaTable()
    model: dict[int, int] = {}
    for _ in range(800):
        page, pages, at = rng.randrange(32), rng.randint(1, 6), rng.randrange(58)
        span = range(page, page + pages)
        if rng.random() < 0.5:
            try:
                put(table, page, pages, memory, at)
            except MappingRefused:
                assert any(p in model for p in span)
            else:
                assert not any(p in model for p in span)
                model.update({p: at + p - page for p in span})
        else:
            removed = table.unmap(page * PAGE, pages * PAGE)
            assert removed == PAGE * sum(model.pop(p, None) is not None for p in span)
        seen = {p: first_byte(table, p) for p in range(40)}
        assert {p: b for p, b in seen.items() if b is not None} == model
        starts = [mapping.start for mapping in table.mappings()]
        assert starts == sorted(starts)


def test_memory_that_could_shrink_is_not_mapped() -> None:

    fd = os.memfd_create("plain", 0)  # without MFD_ALLOW_SEALING: no seal can be set
    os.ftruncate(fd, PAGE)
    try:
        with pytest.raises(NotMappable, match="shrink"):
            SharedMemory(fd)
    finally:
        os.close(fd)


def test_memory_that_is_mapped_cannot_shrink() -> None:

    fd = os.memfd_create("sealable", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2 * PAGE)
    try:
        memory = SharedMemory(fd)
        assert memory.name == "sealable"
        with pytest.raises(PermissionError):
            os.ftruncate(fd, PAGE)
        assert memory.view[2 * PAGE - 1] == 0
    finally:
        os.close(fd)


def test_what_is_no_file_is_not_mapped() -> None:

    for fd in os.pipe():
        with pytest.raises(NotMappable):
            SharedMemory(fd)
        os.close(fd)


def test_a_file_is_mapped_once_and_keeps_its_name() -> None:
    cache = MemoryCache()
    vram = cache.add(SharedMemory.create(PAGE, name="gpu0.vram"))
    assert cache.get(vram.fd) is vram
    many = [SharedMemory.create(PAGE, name=str(n)) for n in range(80)]
    for memory in many:
        cache.get(memory.fd)
    assert cache.get(vram.fd) is not vram  # it was the least recently used
