# SPDX-License-Identifier: Apache-2.0
"""The pure parts of the dma-buf suite: pairs, places in buffers and lists, how a step ended."""

from __future__ import annotations

from errno import EADDRINUSE, EINVAL, EOPNOTSUPP
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.dmabuf_methods import _copy
from guest_agent.rpc import ParameterError
from testbed.instruments.dmabuf import (
    Buffer,
    Entry,
    Mapped,
    Range,
    buffer_pairs,
    errno_word,
    judge_errno,
)
from testbed.suites.p2p_dmabuf import LINKED_TWICE, rack_variants, two_ranges_are_mapped
from testbed.topology import load
from testbed.topology.oracle import Route
from testbed.topology.placement import place
from testbed.topology.plan import Role

PAGE = 4096
ROOT = Path(__file__).parents[2]
Sizes = st.lists(st.integers(1, 64).map(lambda pages: pages * PAGE), min_size=1, max_size=6)


def pairs(name: str, **settings: str) -> list[tuple[str, Route]]:
    topology = load.load(ROOT / "topologies" / f"{name}.yaml", settings)
    return [(str(pair), pair.route) for pair in buffer_pairs(place(topology))]


def test_a_pair_is_of_two_slots_and_an_importer_that_the_module_can_drive() -> None:
    assert pairs("two-root-ports") == [
        ("gpu1.engine-gpu0.vram", Route.ROOT),
        ("gpu0.engine-gpu1.vram", Route.ROOT),
    ]
    assert {route for _, route in pairs("quad-gpu")} == {Route.REDIRECTED}


def test_an_engine_that_the_module_cannot_drive_makes_no_pair() -> None:
    # edu doorbells import then; igb does not.
    assert all(".doorbell" in pair for pair, _ in pairs("quad-gpu", engine="igb"))


def test_a_variant_has_large_video_memories() -> None:
    topology = load.load(ROOT / "topologies" / "two-root-ports.yaml", {})
    plan = place(rack_variants(topology)["large-vram"])
    sizes = {f.vram_size_bytes for f in plan.nodes["host0"].by_role(Role.VRAM)}
    assert sizes == {16 << 30}


@given(Sizes, st.data())
def test_a_place_of_a_buffer_is_in_one_of_its_ranges(sizes: list[int], data: st.DataObject) -> None:
    ranges = [Range(index << 30, size) for index, size in enumerate(sizes)]
    buffer = Buffer(Mock(), "b", 0, ranges)
    offset = data.draw(st.integers(0, buffer.size_bytes - 1))
    at = buffer.bar_offset(offset)
    index, inside = at >> 30, at & ((1 << 30) - 1)
    assert inside < sizes[index]
    assert sum(sizes[:index]) + inside == offset
    with pytest.raises(ValueError, match="beyond"):
        buffer.bar_offset(buffer.size_bytes)


@given(Sizes, st.data())
def test_an_address_is_found_in_the_list(sizes: list[int], data: st.DataObject) -> None:
    entries = tuple(Entry(i << 40, size, False, False) for i, size in enumerate(sizes))
    mapped = Mapped(0, sum(sizes), entries)
    offset = data.draw(st.integers(0, mapped.size_bytes - 1))
    address = mapped.address(offset)
    index, inside = address >> 40, address & ((1 << 40) - 1)
    assert sum(sizes[:index]) + inside == offset
    with pytest.raises(ValueError, match="ends"):
        mapped.address(mapped.size_bytes)


def test_a_step_is_judged_by_its_errno() -> None:
    assert judge_errno("map", 0, 0).holds
    assert judge_errno("map", EINVAL, EINVAL, EOPNOTSUPP).holds
    wrong = judge_errno("attach", 0, EOPNOTSUPP)
    assert (wrong.holds, wrong.reason) == (False, "attach: no error instead of EOPNOTSUPP")
    assert errno_word(100000) == "100000"


def test_what_is_known_of_a_failure_is_said_of_that_failure_alone() -> None:
    assert LINKED_TWICE in two_ranges_are_mapped(Mapped(EADDRINUSE, 0, ())).reason
    assert LINKED_TWICE not in two_ranges_are_mapped(Mapped(EINVAL, 0, ())).reason
    assert two_ranges_are_mapped(Mapped(0, PAGE, ())).holds


def test_who_copies_is_checked_by_the_agent() -> None:
    assert _copy("to", 4096, 8, "stale") == "dma to 4096 8 stale"
    assert _copy("from", 0, 4096, "vmap") == "cpu from 0 4096 vmap"
    for size, how in ((0, "dma"), (4097, "dma"), (8, "magic")):
        with pytest.raises(ParameterError):
            _copy("to", 0, size, how)
