# SPDX-License-Identifier: Apache-2.0
"""What counts as growth, and what does not."""

from __future__ import annotations

from typing import cast

import pytest

from testbed.benchmarks.cycles import EXACT, ROOM_KIB, ROOM_OBJECTS, cycles, grown
from testbed.errors import InputError
from testbed.rack import Rack

START = dict.fromkeys(EXACT, 7) | {
    "rss_kib": 20_000,
    "objects": 10_000,
    "models_private_kib": 90_000,
    "qemu_private_kib": 90_000,
    "cycles": 200,
    "host_descriptors": 200,
}


def test_what_stays_the_same_has_not_grown() -> None:
    assert grown(START, START) == []


@pytest.mark.parametrize("name", [*EXACT, "host_descriptors"])
@pytest.mark.parametrize("by", [-1, 1])
def test_what_is_counted_may_not_change_at_all(name: str, by: int) -> None:
    after = {**START, name: START[name] + by}
    assert grown(START, after) == [f"{name}: {START[name]}, then {after[name]}"]


@pytest.mark.parametrize(("name", "room"), [*ROOM_KIB.items(), ("objects", ROOM_OBJECTS)])
def test_memory_has_some_room_and_may_shrink(name: str, room: int) -> None:
    assert grown(START, {**START, name: START[name] + room}) == []
    assert grown(START, {**START, name: 1}) == []
    assert len(grown(START, {**START, name: START[name] + room + 1})) == 1


def test_an_emulator_s_memory_and_the_number_of_cycles_are_told_only() -> None:
    assert grown(START, {**START, "qemu_private_kib": 10**9, "cycles": 10_000}) == []


def test_too_few_cycles_show_nothing() -> None:
    with pytest.raises(InputError, match="at least 300 cycles, not 299"):
        cycles(cast(Rack, None), 299)
