# SPDX-License-Identifier: Apache-2.0
"""What a rack under test keeps for its tests: devices have one holder at a time."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import pytest

from testbed.errors import HostError
from testbed.harness import racks
from testbed.harness.racks import LiveRack
from testbed.harness.spares import Kind
from tests.contract.fake_rack import FakeSource, quad_gpu


@pytest.fixture(autouse=True)
def _room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racks, "has_room", lambda *_: True)


def kinds(letters: str) -> list[Kind]:
    """Of tests with one fixture each."""
    return [Kind((letter,)) for letter in letters]


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
    rack.set_up(None, [None])
    first = rack.get()
    assert rack.get() is first
    rack.once("kept", lambda _: "of the first")
    rack.refresh()
    rack.set_up(None)
    second = rack.get()
    assert second is not first
    assert rack.once("kept", lambda _: "of the second") == "of the second"
    rack.refresh()
    third = rack.get()
    rack.close()
    assert [made.closed for made in source.racks] == [True] * 3  # no spare was left over
    assert third is source.racks[2]


def test_a_spare_that_nobody_needed_ends_too(tmp_path: Path) -> None:
    source = FakeSource(quad_gpu(engine="model"), tmp_path)
    rack = LiveRack(source, source.topology, "rack")
    rack.set_up(None, [None, None])
    rack.get()
    rack.close()
    assert [made.closed for made in source.racks] == [True, True, True]
    assert [device.device for device in rack.devices] == ["gpu0", "gpu1", "nic0"]  # once


def test_all_end_whatever_one_of_them_says(tmp_path: Path) -> None:
    source = FakeSource(quad_gpu(), tmp_path)
    rack = LiveRack(source, source.topology, "rack")
    rack.set_up(Kind(("a",)), kinds("aa"))
    used = rack.get()
    spares = [machine.rack.result() for machine in rack._spares._machines]

    def refuse() -> None:
        raise OSError("no")

    for each in (used, spares[0]):
        each.close = refuse  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no"):
        rack.close()
    assert [made.closed for made in source.racks].count(True) == 1


def test_a_spare_that_did_not_start_is_the_error_of_the_test_that_waits_for_it(
    tmp_path: Path,
) -> None:
    source = FakeSource(quad_gpu(), tmp_path, {}, {"fails": HostError("no memory")})
    rack = LiveRack(source, source.topology, "rack")
    rack.set_up(Kind(("a",)), kinds("a"))
    assert rack.get()
    (spare,) = rack._spares._machines
    concurrent.futures.wait([spare.rack])
    assert rack.once("bench", lambda machine: machine) is source.racks[0]  # not its error
    rack.refresh()
    rack.set_up(Kind(("a",)))
    with pytest.raises(HostError, match="no memory"):
        rack.get()
    rack.close()
    assert source.racks[0].closed


def test_a_machine_that_dies_takes_no_spare_with_it(tmp_path: Path) -> None:
    source = FakeSource(quad_gpu(), tmp_path)
    rack = LiveRack(source, source.topology, "rack")
    rack.set_up(Kind(("a",)), kinds("aa"))
    rack.get()
    first, second = (machine.rack.result() for machine in rack._spares._machines)
    rack.lost("a test")
    rack.set_up(Kind(("a",)), kinds("a"))
    assert rack.get() is first
    rack.refresh()
    rack.set_up(Kind(("a",)))
    assert rack.get() is second
    rack.close()
    assert [made.closed for made in source.racks] == [True] * 3


class Ahead:
    """Tests of some kinds on a rack of which each has a fresh machine."""

    def __init__(self, tmp_path: Path) -> None:
        self.source = FakeSource(quad_gpu(), tmp_path)
        self.rack = LiveRack(self.source, self.source.topology, "rack")
        self.made: list[tuple[str, object]] = []

    def make(self, name: str, *, ahead: bool = True, holds: str = "") -> object:
        def make(machine: object) -> object:
            self.made.append((name, machine))
            return machine

        return self.rack.once(name, make, ahead=ahead, holds=holds)

    def test(self, letters: str, *names: str, ahead: bool = True) -> object:
        """Set one up that makes these; answers its machine.

        :param letters: one for its own and each of those for which machines get ready.
        """
        kind, *next_kinds = kinds(letters)
        self.rack.refresh()
        self.rack.set_up(kind, next_kinds)
        machine = self.rack.get()
        with self.rack.set_up_by(letters[0]):
            assert all(self.make(name, ahead=ahead) is machine for name in names)
        self.make("in the test itself")
        return machine

    def getting_ready(self) -> list[object]:
        """The machines of tests to come, as soon as they are ready."""
        return [machine.rack.result() for machine in self.rack._spares._machines]

    def made_for(self, machine: object) -> list[str]:
        return [name for name, each in self.made if each is machine]


def test_what_tests_of_a_kind_make_is_there_before_the_next(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    on.test("aa", "bench", "board")
    on.test("aa", "bench", "board")  # begun before it was known
    (third,) = on.getting_ready()
    assert on.made_for(third) == ["bench", "board"]
    assert on.test("ab", "bench", "board") is third
    assert on.made_for(third) == ["bench", "board", "in the test itself"]
    on.rack.close()
    assert all(made.closed for made in on.source.racks)


def test_what_a_fixture_makes_is_made_for_each_test_that_has_it(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    for fixture in ("ground", "board"):
        on.test(fixture[0], fixture)
    on.rack.refresh()
    on.rack.set_up(Kind(()), [Kind(("x", "g")), Kind(("x",))])
    on.rack.get()
    with_ground, with_nothing = on.getting_ready()
    assert on.made_for(with_ground) == ["ground"]
    assert on.made_for(with_nothing) == []
    on.rack.refresh()
    on.rack.set_up(Kind(("g", "y")))  # another test with that fixture
    assert on.rack.get() is with_ground
    on.rack.close()


def test_a_machine_that_waits_is_given_what_becomes_known(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    on.test("aaa", "bench")
    begun = on.getting_ready()
    assert [on.made_for(machine) for machine in begun] == [[], []]
    assert on.test("aa", "bench") is begun[0]
    assert on.getting_ready() == [begun[1]]
    assert on.made_for(begun[1]) == ["bench"]
    assert on.test("a", "bench") is begun[1]
    assert on.made_for(begun[1]) == ["bench", "in the test itself"]
    assert len(on.source.racks) == 3
    on.rack.close()


def test_devices_are_given_to_one_holder_ahead(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    on.rack.refresh()
    on.rack.set_up(Kind(("a", "b")))
    for fixture, name, holds in (("a", "bench", "bench"), ("b", "board", "board"), ("b", "c", "")):
        with on.rack.set_up_by(fixture):
            on.make(name, holds=holds)
    on.rack.refresh()
    on.rack.set_up(Kind(()), [Kind(("a", "b"))])
    on.rack.get()
    (spare,) = on.getting_ready()
    assert on.made_for(spare) == ["bench", "c"]
    on.rack.close()


def test_a_fixture_inside_another_makes_its_own(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    on.rack.set_up(Kind(("outer", "inner")))
    with on.rack.set_up_by("outer"):
        with on.rack.set_up_by("inner"):
            on.make("of the inner")
        on.make("of the outer")
    on.rack.refresh()
    on.rack.set_up(Kind(()), [Kind(("outer",))])
    on.rack.get()
    (spare,) = on.getting_ready()
    assert on.made_for(spare) == ["of the outer"]
    on.rack.close()


def test_a_machine_made_ready_for_another_kind_is_not_used(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    on.test("aa", "bench")
    on.test("aa", "bench")
    (spare,) = on.getting_ready()
    other = on.test("bb", "board")  # what stands between did not come to its set-up
    assert other is not spare
    assert on.made_for(other) == ["board", "in the test itself"]
    on.rack.close()
    assert all(made.closed for made in on.source.racks)


def test_only_what_says_so_is_made_ahead(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    on.test("aa", "bench", ahead=False)
    on.test("aa", "bench", ahead=False)
    (spare,) = on.getting_ready()
    assert on.made_for(spare) == []
    on.rack.close()


def test_what_cannot_be_made_ahead_is_the_tests_to_meet(tmp_path: Path) -> None:
    on = Ahead(tmp_path)
    fails: list[object] = []

    def make(machine: object) -> object:
        if fails:
            raise OSError("no")
        return machine

    on.rack.refresh()
    on.rack.set_up(Kind(("a",)))
    with on.rack.set_up_by("a"):
        on.rack.once("bench", make, ahead=True)
    fails.append(1)
    on.rack.refresh()
    on.rack.set_up(Kind(("a",)), kinds("a"))
    on.rack.get()
    (spare,) = on.getting_ready()
    assert spare is on.source.racks[-1]
    assert on.source.racks[-2].closed  # the one that it was tried on
    assert on.rack._spares._machines[0].made == {}
    on.rack.close()


def test_a_machine_without_disks_is_begun_for_who_has_it_alone(tmp_path: Path) -> None:
    spared = Kind(("a",), disks=False)
    source = FakeSource(quad_gpu(), tmp_path)
    rack = LiveRack(source, source.topology, "rack")
    rack.start()  # before it is known for whom
    rack.set_up(spared, [spared, None, Kind(("b",))], alone=True)
    rack.get()
    rack.refresh()
    for machine in rack._spares._machines:
        machine.rack.result()
    rack.set_up(spared, alone=True)
    rack.get()
    rack.refresh()
    rack.set_up(spared, alone=True)
    rack.get()
    rack.renew()  # nobody expected that
    rack.get()
    rack.close()
    assert sorted(made.disks for made in source.racks) == [False] * 3 + [True] * 3
    assert source.racks[0].disks
    assert not source.racks[-1].disks


def test_a_rack_of_somebody_else_has_its_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSource, "restartable", False)
    source = FakeSource(quad_gpu(), tmp_path)
    rack = LiveRack(source, source.topology, "rack")
    rack.set_up(Kind(("a",), disks=False), alone=True)
    rack.get()
    rack.close()
    assert source.racks[0].disks
