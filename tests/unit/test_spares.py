# SPDX-License-Identifier: Apache-2.0
"""Machines that get ready while a test runs: as many as there is room for, for the right tests."""

from __future__ import annotations

import pytest

from testbed.harness import spares
from testbed.harness.spares import Kind, Machine, Spares
from testbed.matrix.needs import OVERHEAD_BYTES, Need, Room
from testbed.topology.units import GIB, MIB
from tests.contract.fake_rack import quad_gpu


def kind(letter: str) -> Kind:
    """Of tests; those of x, y and z look at no disk."""
    return Kind((letter,), disks=letter not in "xyz")


class Yard:
    """Spares whose machines are letters: of their test, a capital if they were given something."""

    def __init__(self, *, room: int = 99) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.kept: list[str] = []  # each with the kind of its test
        self.known = ""  # kinds of which it is known what their tests make
        self._names: dict[int, str] = {}
        self._spares = Spares(self._begin, self._give, self._end, lambda racks: racks <= room)

    def prepare(self, letters: str) -> None:
        self._spares.prepare([kind(letter) for letter in letters])

    def _begin(self, wanted: Kind | None) -> Machine:
        assert wanted
        (fixture,) = wanted.fixtures
        name = str(fixture)
        machine = Machine(frozenset(name) if name in self.known else frozenset(), wanted.disks)
        name = name.upper() if machine.givers else name
        self._names[id(machine)] = name
        self.begun.append(name)
        return machine

    def _give(self, machine: Machine, wanted: Kind | None) -> None:
        assert wanted
        self.kept.append(self._names[id(machine)] + "".join(map(str, wanted.fixtures)))

    def _end(self, machine: Machine) -> None:
        self.ended.append(self._names[id(machine)])

    def take(self, letter: str) -> str:
        machine = self._spares.take(kind(letter))
        return self._names[id(machine)] if machine else ""

    def left(self) -> list[str]:
        return [self._names[id(each)] for each in self._spares.take_all()]


def test_one_for_each_test_that_is_to_come() -> None:
    yard = Yard()
    yard.prepare("aab")
    yard.prepare("aab")  # they are there
    assert yard.begun == ["a", "a", "b"]
    assert yard.take("a") == "a"
    yard.prepare("abc")
    assert yard.begun == ["a", "a", "b", "c"]
    assert yard.ended == []
    assert yard.kept == ["aa", "aa", "bb", "aa", "bb"]
    assert yard.left() == ["a", "b", "c"]
    assert yard.left() == []


def test_one_that_was_given_something_serves_its_kind_alone() -> None:
    yard = Yard()
    yard.known = "a"
    yard.prepare("aab")
    assert yard.begun == ["A", "A", "b"]
    assert yard.take("b") == "b"
    assert yard.take("b") == ""
    assert yard.take("a") == "A"
    assert yard.left() == ["A"]


def test_one_that_was_given_nothing_serves_any() -> None:
    yard = Yard()
    yard.prepare("a")
    assert yard.take("b") == "a"


def test_one_without_disks_serves_nobody_who_may_look_at_them() -> None:
    yard = Yard()
    yard.prepare("xa")
    assert (yard.take("a"), yard.take("a")) == ("a", "")
    assert yard.take("y") == "x"
    yard.prepare("xa")
    yard.known = "y"
    yard.prepare("ay")  # what stands between was skipped
    assert yard.begun == ["x", "a", "x", "a"]
    assert (yard.take("y"), yard.take("a")) == ("x", "a")
    yard.prepare("y")
    assert (yard.take("x"), yard.take("y")) == ("", "Y")


def test_one_with_disks_serves_also_who_looks_at_none() -> None:
    yard = Yard()
    yard.prepare("a")
    yard.prepare("x")
    assert yard.begun == ["a"]
    assert yard.take("x") == "a"


def test_what_none_of_the_next_tests_can_use_ends() -> None:
    yard = Yard()
    yard.known = "a"
    yard.prepare("aaa")
    yard.prepare("ba")  # of three tests two were skipped before they had a machine
    assert (yard.begun, yard.ended) == (["A", "A", "A", "b"], ["A", "A"])
    assert yard.left() == ["A", "b"]
    yard.prepare("a")
    yard.prepare("")
    assert yard.ended == ["A", "A", "A"]
    assert yard.left() == []


def test_more_than_one_only_where_there_is_room() -> None:
    yard = Yard(room=2)
    yard.prepare("abcd")
    assert yard.begun == ["a", "b"]
    alone = Yard(room=0)
    alone.prepare("ab")
    assert alone.begun == ["a"]


@pytest.mark.parametrize(("cores", "vcpus", "most"), [(1, 1, 1), (2, 1, 2), (8, 4, 2), (2, 4, 1)])
def test_as_many_as_have_a_processor(
    monkeypatch: pytest.MonkeyPatch, cores: int, vcpus: int, most: int
) -> None:
    monkeypatch.setattr(spares, "room_here", lambda _: Room(cores, cores, 0))
    monkeypatch.setattr(spares, "need_of", lambda _: Need(cores=vcpus))
    assert spares.most_at_once(quad_gpu()) == most


def test_their_memory_is_what_they_may_come_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    one = GIB + 2 * MIB + OVERHEAD_BYTES  # two GPUs of one MiB
    monkeypatch.setattr(spares, "room_here", lambda _: Room(2, 2, 2 * one))
    assert spares.has_room(quad_gpu(), 2)
    assert not spares.has_room(quad_gpu(), 3)
