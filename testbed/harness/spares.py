# SPDX-License-Identifier: Apache-2.0
"""Machines that get ready for tests to come, while another test runs.

A machine is begun for a test, in the order of the tests. What it is given before that test begins
is what the fixtures of that test made for tests before it; so it serves tests with these fixtures
alone, and one that was given nothing serves any. One whose disks have no driver serves nobody who
may look.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from testbed.instruments.interface import Rack
from testbed.matrix.needs import need_of, room_here
from testbed.topology.model import Topology

Value = tuple[object, Callable[[Any], None], str]  # kept: what, how it is closed, who holds it


@dataclass(frozen=True)
class Kind:
    """What tests have in common that can take each other's machines.

    ``fixtures``  what sets them up, each with all that decides what it makes.
    ``disks``     False: they have their machine alone, and look at no disk of it.
    """

    fixtures: tuple[Hashable, ...]
    disks: bool = True


@dataclass
class Machine:
    """One on its way; ``made``: what it is given, which its first test would make.

    ``givers``  the fixtures that would make it.
    ``disks``   they have their driver.
    """

    givers: frozenset[Hashable] = frozenset()
    disks: bool = True
    rack: Future[Rack] = field(default_factory=Future)
    made: dict[object, Value] = field(default_factory=dict)

    def serves(self, kind: Kind | None) -> bool:
        """Whether a test of that kind finds on it all that it may look at, and nothing but what it
        would have made."""
        fixtures = kind.fixtures if kind is not None else ()
        spared = kind is not None and not kind.disks
        return self.givers.issubset(fixtures) and (self.disks or spared)


class Spares:
    """See the module.

    :param begin: starts one for a test of some kind, in the background.
    :param give: gives one that is kept for a test of some kind what that test will make, likewise.
    :param end: ends one that nobody will use, in the background.
    :param holds: whether this host has room for so many at once; asked of more than one.
    """

    def __init__(
        self,
        begin: Callable[[Kind | None], Machine],
        give: Callable[[Machine, Kind | None], None],
        end: Callable[[Machine], None],
        holds: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._begin = begin
        self._give = give
        self._end = end
        self._holds = holds
        self._machines: list[Machine] = []  # the one that began first is first

    def take(self, kind: Kind | None) -> Machine | None:
        """One for a test of that kind, which is not a spare any more."""
        found = _best(self._machines, kind)
        if found is not None:
            self._machines.remove(found)
        return found

    def prepare(self, kinds: Sequence[Kind | None]) -> None:
        """Have one for each of the next tests, which are of these kinds, and no other."""
        unused, kept = self._machines, []
        missing = []
        for kind in kinds:
            found = _best(unused, kind)
            if found is None:
                missing.append(kind)
            else:
                unused.remove(found)
                kept.append(found)
                self._give(found, kind)
        self._machines = kept
        for machine in unused:
            self._end(machine)
        for kind in missing:
            if self._machines and not self._holds(len(self._machines) + 1):
                return
            self._machines.append(self._begin(kind))

    def take_all(self) -> list[Machine]:
        """All, none of which is a spare any more."""
        machines, self._machines = self._machines, []
        return machines


def _best(machines: Sequence[Machine], kind: Kind | None) -> Machine | None:
    """The first for a test of that kind; one with disks only if there is none without."""
    serving = [machine for machine in machines if machine.serves(kind)]
    return min(serving, key=lambda machine: machine.disks, default=None)


def most_at_once(topology: Topology) -> int:
    """How many machines of a rack's kind may get ready at once: as this host has processors."""
    return max(1, room_here(None).cores // max(1, need_of(topology).cores))


def has_room(topology: Topology, racks: int) -> bool:
    """Whether this host has the memory for so many further racks, if they turn out large."""
    return racks * need_of(topology).memory_bytes <= room_here(None).memory_bytes
