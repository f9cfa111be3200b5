# SPDX-License-Identifier: Apache-2.0
"""The racks of a test session: started in the background, replaced when they die, ended together.

A :class:`LiveRack` stands for "the rack under test", whichever machine that is at the moment: when
it died in a test, the next test gets a fresh one. Nothing is ever tried again for a test that has
ended; replacing the machine only keeps one death from deciding all verdicts that follow.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from testbed.errors import CapabilityMissing, TestbedError
from testbed.harness.spares import Kind, Machine, Spares, Value, has_room
from testbed.instruments.device_records import records
from testbed.instruments.interface import Rack, RackNode, RackSource
from testbed.machine.command import CONSOLE_LOG
from testbed.results.record import DeviceRecord
from testbed.topology.model import Topology
from testbed.topology.plan import RackPlan

T = TypeVar("T")

MAIN = "rack"  # the label of the rack under test
MAX_DEATHS = 4
END_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class _Maker:
    """How a value was made for a machine, so that it can be made for the next one before a test."""

    key: object
    make: Callable[[Rack], object]
    close: Callable[[Any], None]
    holds: str

    def value(self, rack: Rack) -> Value:
        return self.make(rack), self.close, self.holds


class LiveRack:
    """A rack that outlives its machines. It is a :class:`testbed.instruments.interface.Rack`.

    A fixture makes the same values (:meth:`once`) for each test of which it sets up the same case.
    So a machine that gets ready for a test, while another one runs, is given these before, by the
    same functions. Only those that say that they may be made ``ahead``. And a machine that is begun
    for tests that look at no disk need not give disks their driver.
    """

    def __init__(self, source: RackSource, topology: Topology, label: str) -> None:
        self._source = source
        self._topology = topology
        self._label = label
        self._starts = 0
        self._deaths = 0
        self._future: Future[Rack] | None = None
        self._spares = Spares(
            self._begin,
            self._give_more,
            lambda machine: self._end_aside(machine.rack, unused=True),
            lambda racks: has_room(topology, racks),
        )
        self._makers: dict[Hashable, dict[object, _Maker]] = {}  # by fixture: what it made
        self._fixture: Hashable = None  # what sets a test up just now
        self._kind: Kind | None = None  # of a test that wants a fresh machine
        self._ends: list[threading.Thread] = []  # of machines that were in use
        self._why_gone = ""
        self._kept: dict[object, Value] = {}
        self.waited_s = 0.0  # in all, for machines to boot
        self.touched = False  # by the test that runs
        self.used = False  # by any test
        self.serves_one_test = False  # so that what it leaves behind is nobody's concern
        self._upcoming: Sequence[Kind | None] | None = None  # until machines have begun for them
        self.last_versions: Mapping[str, Any] = {}
        self.devices: list[DeviceRecord] = []  # of its machines that have ended

    def start(self) -> None:
        """Begin to boot in the background, if that has not been done."""
        if self._future is not None:
            return
        machine = self._spares.take(self._kind) or self._begin(self._kind, ahead=False)
        self._future, self._kept = machine.rack, machine.made

    def set_up(
        self, kind: Kind | None, upcoming: Sequence[Kind | None] = (), *, alone: bool = False
    ) -> None:
        """A test of that kind begins to be set up; None: one that does not want a fresh machine.

        :param upcoming: the kinds of the next tests that want one: when this test has its machine,
            others get ready for them.
        :param alone: no other test uses this one's machine, before or after it.
        """
        self._kind, self._upcoming = kind, upcoming
        self.serves_one_test = alone and self.ours

    @contextlib.contextmanager
    def set_up_by(self, fixture: Hashable) -> Iterator[None]:
        """What is made meanwhile, this fixture makes for each test of a kind that names it."""
        before, self._fixture = self._fixture, fixture
        try:
            yield
        finally:
            self._fixture = before

    def _known(self, kind: Kind | None) -> dict[Hashable, list[_Maker]]:
        """What tests of that kind will make for all that is known, by fixture; for one holder of
        devices, as another would not get them."""
        known: dict[Hashable, list[_Maker]] = {}
        holder = ""
        for fixture in kind.fixtures if kind is not None else ():
            for maker in self._makers.get(fixture, {}).values():
                holder = holder or maker.holds
                if maker.holds in ("", holder):
                    known.setdefault(fixture, []).append(maker)
        return known

    def _begin(self, kind: Kind | None, *, ahead: bool = True) -> Machine:
        machine = Machine(disks=kind is None or kind.disks or not self.ours)
        self._give(machine, self._known(kind) if ahead else {}, None)
        return machine

    def _give_more(self, machine: Machine, kind: Kind | None) -> None:
        """Give a spare that has nothing what has become known of its test since it was begun."""
        known = {} if machine.givers else self._known(kind)
        if known:
            before, machine.rack = machine.rack, Future()
            self._give(machine, known, before)

    def _give(
        self,
        machine: Machine,
        known: Mapping[Hashable, Sequence[_Maker]],
        before: Future[Rack] | None,
    ) -> None:
        """In the background: start it, unless that was begun ``before``, and make what is known."""
        self._starts += 1
        label = self._label if self._starts == 1 else f"{self._label}-{self._starts}"
        machine.givers = frozenset(known)
        makers = {maker.key: maker for some in known.values() for maker in some}
        future, disks = machine.rack, machine.disks

        def start(name: str) -> Rack:
            return self._source.start(self._topology, name, disks=disks)

        def boot() -> None:
            try:
                rack = before.result() if before is not None else start(label)
                try:
                    for maker in makers.values():
                        machine.made[maker.key] = maker.value(rack)
                except Exception:  # the test itself meets it, on a machine that it did not touch
                    machine.made.clear()
                    rack.close()
                    rack = start(f"{label}-again")
                future.set_result(rack)
            except BaseException as error:  # raised where it is waited for
                future.set_exception(error)

        # A daemon: after Ctrl-C nobody waits for a boot. The rack's keeper ends the machines
        # when this process does.
        threading.Thread(target=boot, name=f"boot {label}", daemon=True).start()

    def get(self) -> Rack:
        """The running rack, booted if need be.

        Raises:
            LaunchError, LostError: it did not boot; said once, to the test that waited for it.
            CapabilityMissing: it is gone, and there will be no other.
        """
        self.touched = self.used = True
        if self._why_gone:
            raise CapabilityMissing(f"not run: {self._why_gone}")
        self.start()
        assert self._future is not None
        before = time.monotonic()
        try:
            rack = self._future.result()
        except TestbedError as error:
            self._why_gone = f"rack {self._label} did not start ({error.message})"
            raise
        finally:
            self.waited_s += time.monotonic() - before
        self.last_versions = rack.versions
        if self._upcoming is not None and self._source.restartable:
            upcoming, self._upcoming = self._upcoming, None
            self._spares.prepare(upcoming)
        return rack

    def lost(self, test: str) -> None:
        """The machine died in ``test``: end what is left of it; :meth:`get` boots another."""
        self._kept.clear()
        self._deaths += 1
        if not self._source.restartable:
            self._why_gone = f"rack {self._label} died in {test}, and is not ours to start again"
        elif self._deaths >= MAX_DEATHS:
            self._why_gone = f"rack {self._label} died {self._deaths} times, last in {test}"
        self._end()

    def renew(self) -> None:
        """A test has broken a part of the machine for good: end it; :meth:`get` boots another."""
        self._kept.clear()
        self._end()

    def refresh(self) -> None:
        """Let the next test find a machine that no test has used; what there is ends meanwhile."""
        if not self.used or not self._source.restartable:
            return
        self._kept.clear()
        self.used = False
        future, self._future = self._future, None
        if future is not None:
            self._end_aside(future)

    def _end_aside(self, future: Future[Rack], *, unused: bool = False) -> None:
        words = {"unused": unused}
        thread = threading.Thread(
            target=self._end_of, args=(future, True), kwargs=words, daemon=True
        )
        thread.start()
        self._ends.append(thread)

    @property
    def ours(self) -> bool:
        """It was started for this session, and ends with it."""
        return self._source.restartable

    @property
    def is_running(self) -> bool:
        """A machine is there to be used: booted, and not ended by the session."""
        future = self._future
        return future is not None and future.done() and future.exception() is None

    @property
    def is_dead(self) -> bool:
        """It was running, and one of its machines is not any more."""
        if self._future is None or not self.is_running:
            return False
        return not all(node.alive for node in self._future.result().nodes.values())

    def console_sizes(self) -> dict[tuple[str, str], int]:
        """How many bytes its consoles have said so far, by the rack's folder and the node; neither
        waits for the machine nor counts as use of it."""
        if self._future is None or not self.is_running:
            return {}
        rack = self._future.result()
        sizes: dict[tuple[str, str], int] = {}
        for node in rack.nodes.values():
            with contextlib.suppress(OSError):
                log = node.log_dir / CONSOLE_LOG
                sizes[rack.run_dir.name, node.name] = log.stat().st_size
        return sizes

    def once(
        self,
        key: object,
        make: Callable[[Rack], T],
        close: Callable[[T], None] = lambda _: None,
        *,
        holds: str = "",
        ahead: bool = False,
    ) -> T:
        """A value made once for each machine, and kept under ``key`` until :meth:`drop`.

        :param holds: on whose behalf it holds devices, which nobody else can then open: before it
            is made, values that hold some on another's behalf are closed.
        :param ahead: it may be made by a machine that gets ready, before the test that wants it:
            ``make`` knows of no machine but the one that it is given.
        """
        rack = self.get()
        if key not in self._kept:
            if holds:
                for other in [k for k, kept in self._kept.items() if kept[2] not in ("", holds)]:
                    self.drop(other)
            self._kept[key] = (make(rack), close, holds)
        if ahead and self._fixture is not None:
            makers = self._makers.setdefault(self._fixture, {})
            makers.setdefault(key, _Maker(key, make, close, holds))
        return self._kept[key][0]  # type: ignore[return-value]

    def drop(self, key: object) -> None:
        """Close the value kept under ``key``, if there is one."""
        if key in self._kept:
            value, close, _ = self._kept.pop(key)
            close(value)

    def drop_all(self) -> None:
        """Close all values kept."""
        for key in list(self._kept):
            self.drop(key)

    def close(self, *, wait: bool = True) -> None:
        """End the machine for good; without ``wait`` one that still boots is left to its keeper."""
        self._kept.clear()
        self._why_gone = self._why_gone or "the session is over"
        with contextlib.ExitStack() as ends:  # all of them, whatever one of them raises
            for thread in self._ends:
                ends.callback(thread.join, END_TIMEOUT_S if wait else 0)
            for machine in self._spares.take_all():
                ends.callback(self._end_of, machine.rack, wait, unused=True)
            self._end(wait=wait)

    def _end(self, *, wait: bool = True) -> None:
        future, self._future = self._future, None
        self._end_of(future, wait)

    def _end_of(self, future: Future[Rack] | None, wait: bool, *, unused: bool = False) -> None:
        if future is not None and (wait or future.done()) and future.exception() is None:
            if not unused:
                self.devices += records(future.result(), self._label)
            future.result().close()

    @property
    def name(self) -> str:
        """The running rack's name."""
        return self.get().name

    @property
    def plan(self) -> RackPlan:
        """Where everything stands."""
        return self.get().plan

    @property
    def topology(self) -> Topology:
        """What it is made from."""
        return self._topology

    @property
    def run_dir(self) -> Path:
        """Where its logs are."""
        return self.get().run_dir

    @property
    def versions(self) -> Mapping[str, Any]:
        """What it was made with."""
        return self.get().versions

    @property
    def nodes(self) -> Mapping[str, RackNode]:
        """Its machines, by name."""
        return self.get().nodes


class RackPool:
    """The rack under test and its variants."""

    def __init__(self, source: RackSource) -> None:
        self.source = source
        self.main = LiveRack(source, source.topology, MAIN)
        self._variants: dict[str, LiveRack] = {}

    def declare(self, name: str, topology: Topology) -> None:
        """Let :meth:`variant` know a variant; it boots when it is first used, or told to start."""
        if name not in self._variants:
            self._variants[name] = LiveRack(self.source, topology, f"rack-{name}")

    def variant(self, name: str) -> LiveRack:
        """The variant called ``name``.

        Raises:
            CapabilityMissing: none was declared: it makes no sense for this rack.
        """
        if name not in self._variants:
            raise CapabilityMissing(f"this rack has no variant '{name}'")
        return self._variants[name]

    def all(self) -> list[LiveRack]:
        """The main rack first."""
        return [self.main, *self._variants.values()]

    def devices(self) -> list[DeviceRecord]:
        """The model devices of all racks that have ended."""
        return [device for rack in self.all() for device in rack.devices]

    def waited_s(self) -> float:
        """What tests have waited for machines to boot, in all."""
        return sum(rack.waited_s for rack in self.all())

    def close(self, *, wait: bool = True) -> list[Exception]:
        """End everything; what went wrong with that is returned, after all were tried.

        :param wait: also for racks that are still booting.
        """
        failures: list[Exception] = []
        for rack in self.all():
            try:
                rack.close(wait=wait)
            except Exception as error:  # the others must end too
                failures.append(error)
        return failures
