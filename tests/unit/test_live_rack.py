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


class Ahead:
    """Tests of some kinds on a rack of which each has a fresh machine."""

    def __init__(self, tmp_path: Path) -> None:
        self.source = FakeSource(quad_gpu(), tmp_path)
        self.rack = LiveRack(self.source, self.source.topology, "rack")
        self.made: list[tuple[str, object]] = []

    def make(self, name: str, *, ahead: bool = True) -> object:
        def make(machine: object) -> object:
            self.made.append((name, machine))
            return machine

        return self.rack.once(name, make, ahead=ahead)

    def test(self, kind: str, next_kind: str, *names: str, ahead: bool = True) -> object:
        """Set one up that makes these; answers its machine."""
        self.rack.refresh()
        self.rack.set_up(kind)
        self.rack.wants_spare, self.rack.next_kind = True, next_kind
        machine = self.rack.get()
        assert all(self.make(name, ahead=ahead) is machine for name in names)
        self.rack.was_set_up()
        self.make("in the test itself")
        return machine

    def made_for(self, machine: object) -> list[str]:
        return [name for name, each in self.made if each is machine]


def test_what_tests_of_a_kind_make_is_there_before_the_next(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    on.test("a", "a", "bench", "board")
    on.test("a", "a", "bench", "board")  # begun before it was known
    machine = on.rack._spare
    assert machine is not None
    third = machine.rack.result()
    assert on.made_for(third) == ["bench", "board"]
    assert on.test("a", "b", "bench", "board") is third
    assert on.made_for(third) == ["bench", "board", "in the test itself"]
    on.rack.close()
    assert all(made.closed for made in on.source.racks)


def test_a_machine_made_ready_for_another_kind_is_not_used(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    on.test("a", "a", "bench")
    on.test("a", "a", "bench")
    spare = on.rack._spare
    assert spare is not None
    other = on.test("b", "b", "board")  # what stands between did not come to its set-up
    assert other is not spare.rack.result()
    assert on.made_for(other) == ["board", "in the test itself"]
    on.rack.close()
    assert all(made.closed for made in on.source.racks)


def test_only_what_says_so_is_made_ahead(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    on.test("a", "a", "bench", ahead=False)
    on.test("a", "a", "bench", ahead=False)
    spare = on.rack._spare
    assert spare is not None
    assert on.made_for(spare.rack.result()) == []
    on.rack.close()


def test_what_cannot_be_made_ahead_is_the_tests_to_meet(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    fails: list[object] = []

    def make(machine: object) -> object:
        if fails:
            raise OSError("no")
        return machine

    for _ in range(2):
        on.rack.refresh()
        on.rack.set_up("a")
        on.rack.wants_spare, on.rack.next_kind = False, "a"
        on.rack.get()
        on.rack.once("bench", make, ahead=True)
        on.rack.was_set_up()
    fails.append(1)
    on.rack.wants_spare = True
    on.rack.get()
    spare = on.rack._spare
    assert spare is not None
    assert spare.rack.result() is on.source.racks[-1]
    assert on.source.racks[-2].closed  # the one that it was tried on
    assert spare.made == {}
    on.rack.close()
