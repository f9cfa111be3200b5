# SPDX-License-Identifier: Apache-2.0
"""Page tables as the agent builds them, read back as the model walks them."""

from __future__ import annotations

import contextlib
import mmap

from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent.hw.gpu_mmu import TABLE_BYTES, PageTables, TablePool
from guest_agent.hw.region import Region
from guest_agent.rpc import ParameterError
from testbed.models.memory import SharedMemory
from testbed.models.paging import Untranslatable, walk

HUGE = 2 << 20
TABLES = 256  # more than all actions can take without an invalidation
# Few places, so that actions meet: around a border of the largest tables too.
PLACES = [*range(0, 4 * HUGE, HUGE // 2), (1 << 39) - HUGE, 1 << 39, (1 << 47) - 4096]

actions = st.lists(
    st.tuples(
        st.sampled_from(["map", "unmap", "invalidate"]),
        st.sampled_from(PLACES),
        st.sampled_from([4096, 2 * 4096, HUGE, HUGE + 4096, 2 * HUGE]),
        st.sampled_from([4096, HUGE]),
        st.booleans(),
        st.integers(0, 1000),
    ),
    max_size=30,
)


def translated(memory: SharedMemory, root: int, address: int) -> tuple[int, int, bool] | None:
    """What the model finds: address, aperture, writable."""
    try:
        found = walk(memory, root, address)
    except Untranslatable:
        return None
    return found.address + address - found.start, found.aperture, found.writable


@settings(max_examples=200)
@given(actions)
def test_the_model_finds_exactly_what_was_mapped(
    actions: list[tuple[str, int, int, int, bool, int]],
) -> None:
    memory = SharedMemory.create(TABLES * TABLE_BYTES, name="vram")
    region = Region(mmap.mmap(memory.fd, memory.size_bytes))
    pool = TablePool(region, 0, memory.size_bytes)
    tables = PageTables(pool)
    expected: dict[int, tuple[int, int, bool]] = {}  # by 4 KiB page
    large: set[int] = set()
    for what, virtual, size, page, flag, number in actions:
        pages = range(virtual, virtual + size, 4096)
        if what == "invalidate":
            pool.invalidated()
        elif what == "map":
            address = number * HUGE
            done = 0
            aperture = 0x14 if flag else 1
            with contextlib.suppress(ParameterError, FileExistsError):
                # One page at a time, so that a map that fails halfway has one meaning.
                for done in range(0, size, page):
                    here = virtual + done
                    tables.map(here, page, address + done, aperture, page_bytes=page, writable=flag)
                    for within in range(0, page, 4096):
                        expected[here + within] = (address + done + within, aperture, flag)
                    if page == HUGE:
                        large.add(here)
        else:
            cut = any(
                start < virtual + size and virtual < start + HUGE
                and not (virtual <= start and start + HUGE <= virtual + size)
                for start in large
            )  # fmt: skip
            try:
                unmapped = tables.unmap(virtual, size)
            except ParameterError:
                assert cut
                return
            assert not cut
            assert unmapped == sum(expected.pop(each, None) is not None for each in pages) * 4096
            large = {each for each in large if each in expected}
    for place in {*expected, *PLACES}:
        assert translated(memory, tables.root, place) == expected.get(place)
        assert (tables.find(place) != 0) == (place in expected)
    for start in large:
        tables.unmap(start, HUGE)
    for place in expected:
        if not tables.find(place):
            continue  # it was a part of a large page
        tables.unmap(place, 4096)
    pool.invalidated()
    # Nothing but the root is in use: everything that was taken can be taken again.
    assert len({pool.take() for _ in range(TABLES - 1)}) == TABLES - 1
    region.close()
