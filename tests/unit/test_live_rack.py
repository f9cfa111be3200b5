# SPDX-License-Identifier: Apache-2.0
"""What a rack under test keeps for its tests: devices have one holder at a time."""

from __future__ import annotations

from pathlib import Path

from testbed.harness.racks import LiveRack
from tests.contract.fake_rack import FakeSource, quad_gpu


def test_who_holds_devices_gives_way_to_who_wants_them_next(tmp_path: Path) -> None:
    source = FakeSource(quad_gpu(), tmp_path)
    rack = LiveRack(source, source.topology, "rack")
    closed: list[str] = []

    def keep(name: str, holds: str = "") -> str:
        return rack.once(name, lambda _: name, closed.append, holds=holds)

    keep("guest")
    assert (keep("one", "bench"), keep("two", "bench")) == ("one", "two")
    assert not closed  # of one holder
    keep("fabric", "fabric")
    assert closed == ["one", "two"]
    keep("one", "bench")
    assert closed == ["one", "two", "fabric"]
    keep("one", "bench")
    rack.drop_all()
    assert closed == ["one", "two", "fabric", "guest", "one"]  # and the first holds no device
    rack.close()


def test_a_fresh_machine_is_ready_when_the_next_test_wants_one(tmp_path: Path) -> None:
    source = FakeSource(quad_gpu(), tmp_path)
    rack = LiveRack(source, source.topology, "rack")
    rack.refresh()  # nothing has been used
    rack.wants_spare = True
    first = rack.get()
    assert rack.get() is first
    rack.once("kept", lambda _: "of the first")
    rack.refresh()
    rack.wants_spare = False
    second = rack.get()
    assert second is not first
    assert rack.once("kept", lambda _: "of the second") == "of the second"
    rack.refresh()
    third = rack.get()
    rack.close()
    assert [made.closed for made in source.racks] == [True] * 3  # no spare was left over
    assert third is source.racks[2]


def test_a_spare_that_nobody_needed_ends_too(tmp_path: Path) -> None:
    source = FakeSource(quad_gpu(), tmp_path)
    rack = LiveRack(source, source.topology, "rack")
    rack.wants_spare = True
    rack.get()
    rack.close()
    assert [made.closed for made in source.racks] == [True, True]
