# SPDX-License-Identifier: Apache-2.0
"""The plugin's working half: turns what pytest sees into outcomes, and looks after the racks.

Registered only when a rack was asked for. Verdicts: AssertionError (and ``pytest.fail``) is FAIL;
LostError in any phase is LOST, with the console's tail; CapabilityMissing (and ``pytest.skip``) is
SKIP; any other exception is ERROR. The phases of a test combine to the worst. Nothing is retried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from testbed.errors import CapabilityMissing, LostError, ModuleStays, TestbedError
from testbed.harness import early
from testbed.harness.fresh import WITHOUT_DISKS, FreshMachines, fixtures_of, is_without_disks
from testbed.harness.racks import RackPool
from testbed.instruments.interface import RackSource
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Observer
from testbed.results.error_details import details_of
from testbed.results.record import DeviceRecord
from testbed.results.report_record import ReportRecord
from testbed.results.verdicts import ConsoleSpan, Outcome, Verdict, combine
from testbed.topology.model import Topology

if TYPE_CHECKING:
    from testbed.harness.report_items import ReportOptions
    from testbed.payload.collection import Payload
    from testbed.payload.multiboot import MachinePrograms

REQUIREMENT = "requirement"
GATED_BY = "gated_by"
DISKS = "disks"  # the fixture of who looks at them
VARIANTS_HOOK = "rack_variants"  # a module's function: topology → {name: topology}

_VERDICT = "testbed_verdict"  # pytest's reports carry it from the test to the terminal


@dataclass(frozen=True)
class _Ending:
    """How one phase of a test ended, if not well."""

    verdict: Verdict
    reason: str
    details: str = ""
    console_tail: str = ""
    spoilt: bool = False  # the machine, for every other test


_OBSERVER = pytest.StashKey[Observer]()
_ENDINGS = pytest.StashKey[list[_Ending]]()
_DURATION: pytest.StashKey[float] = pytest.StashKey()
_BEGAN = pytest.StashKey[tuple[float, dict[tuple[str, str], int]]]()  # when, and consoles' sizes

SESSION = pytest.StashKey["ConformanceSession"]()


class ConformanceSession:
    """One pytest session on one rack.

    :param on_plan: is told how many tests there will be.
    :param on_outcome: is told each outcome as soon as it is there.
    :param on_parts: is told the outcomes of a test that ran other tests.
    :param pristine: every test starts on machines that no other has used.
    :param on_end: is called last, when the racks have ended.
    :param report_options: for bug reports among the tests; pytest's own options if None.
    :param payload: what a test runs that runs other tests, if the session has one.
    """

    def __init__(
        self,
        source: RackSource,
        *,
        mutation: Mutation = Mutation.NONE,
        policy: str = "",
        on_plan: Callable[[int], None] = lambda _: None,
        on_outcome: Callable[[Outcome], None] = lambda _: None,
        on_parts: Callable[[str, Sequence[Outcome]], None] = lambda _name, _parts: None,
        on_end: Callable[[ConformanceSession], object] = lambda _: None,
        report_options: ReportOptions | None = None,
        payload: Payload | MachinePrograms | None = None,
        pristine: bool = False,
    ) -> None:
        self.pool = RackPool(source)
        self._fresh = FreshMachines(self.pool, all_tests=pristine)
        self.payload = payload
        self.report_options = report_options
        self.reports: list[ReportRecord] = []  # bug reports among the tests
        self.mutation = mutation
        self.policy = policy
        self.outcomes: list[Outcome] = []
        self.devices: list[DeviceRecord] = []  # of the racks that have ended
        self.interrupted = False
        self._planned = False
        self._waited_s = 0.0
        self._on_plan = on_plan
        self._on_outcome = on_outcome
        self._on_parts = on_parts
        self._on_end = on_end

    # What tests use, through the fixtures

    def observer(self, item: pytest.Item) -> Observer:
        """The test's own."""
        return item.stash.setdefault(_OBSERVER, Observer())

    # Collection

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """``-k MAP_06`` (or ``MAP-06``) means the tests of that requirement."""
        for requirement in _marked(item, REQUIREMENT):
            item.extra_keyword_matches |= {requirement, requirement.replace("-", "_")}

    def pytest_configure(self, config: pytest.Config) -> None:
        """Be found by the fixtures."""
        config.stash[SESSION] = self
        config.pluginmanager.register(self._fresh)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(
        self, items: list[pytest.Item]
    ) -> Generator[None, None, None]:
        """Whatever else was deselected (``-k``), the gates of what is left run too."""
        before = list(items)
        yield
        kept = set(items)
        for path, gate in {(item.path, g) for item in items for g in _marked(item, GATED_BY)}:
            gates = [item for item in before if gate in _marked(item, REQUIREMENT)]
            # A module's own gate if it has one, else that of the suite's other modules.
            kept.update([item for item in gates if item.path == path] or gates)
        items[:] = [item for item in before if item in kept]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Announce the plan, and let the racks boot while pytest gets going."""
        self._announce(len(session.items))
        if session.config.option.collectonly:
            return
        wanted = early.wanted(session.items, self.pool.source.plan)
        if wanted.main:
            self.pool.main.start()
        made: dict[object, dict[str, Topology]] = {}  # by hook, which several modules can share
        for item in session.items:
            if "variant" in fixtures_of(item) and isinstance(item, pytest.Function):
                hook = getattr(item.module, VARIANTS_HOOK, None)
                if hook not in made:
                    made[hook] = hook(self.pool.source.topology) if hook else {}
                    for name, topology in made[hook].items():
                        self.pool.declare(name, topology)
                for name in wanted.variants.get(item, set()) & made[hook].keys():
                    self.pool.variant(name).start()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A test file that cannot be imported is an ERROR of the run."""
        if report.failed:
            text = report.longreprtext
            said = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
            reason = said[-1] if said else _first_line(text)
            self.outcomes.append(Outcome((), report.nodeid, Verdict.ERROR, reason, details=text))

    # Running

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Hold back what a gate forbids. CapabilityMissing: SKIP.

        :raises TestbedError: it says that it looks at no disk, and has a fixture that does.
        """
        item.stash[_BEGAN] = (time.time(), self._console_sizes())
        if is_without_disks(item) and DISKS in fixtures_of(item):
            raise TestbedError(f"it is marked {WITHOUT_DISKS}, and asks for the fixture '{DISKS}'")
        for gate in _marked(item, GATED_BY):
            self._check_gate(gate)

    def _check_gate(self, gate: str) -> None:
        ends = [outcome for outcome in self.outcomes if gate in outcome.requirements]
        if not ends:
            raise CapabilityMissing(f"not shown: {gate} has to run first")
        verdict = combine(outcome.verdict for outcome in ends)
        reason = next(outcome.reason for outcome in ends if outcome.verdict is verdict)
        if verdict is Verdict.FAIL:
            raise CapabilityMissing(f"set-up invalid, {gate} failed: {reason}")
        if verdict is Verdict.SKIP:
            raise CapabilityMissing(reason)
        if verdict is not Verdict.PASS:
            raise CapabilityMissing(f"set-up not shown to be valid: {gate} ended {verdict}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note how the phase ended; after the last one, the outcome is there."""
        report = yield
        if call.excinfo is not None and _was_interrupted(call.excinfo.value):
            raise KeyboardInterrupt
        endings = item.stash.setdefault(_ENDINGS, [])
        ending = _ending_of(report, call)
        if ending is not None:
            endings.append(ending)
            setattr(report, _VERDICT, ending.verdict)
            if ending.verdict is Verdict.SKIP:
                report.outcome = "skipped"
                path, line, _ = item.location
                report.longrepr = (path, line or 0, f"Skipped: {ending.reason}")
        # A rack's boot is not the test's time.
        waited_s, self._waited_s = self.pool.waited_s() - self._waited_s, self.pool.waited_s()
        spent_s = max(0.0, call.duration - waited_s)
        item.stash[_DURATION] = item.stash.get(_DURATION, 0.0) + spent_s
        if report.when == "teardown":
            self._finish(item, endings)
        return report

    def _finish(self, item: pytest.Item, endings: list[_Ending]) -> None:
        observer = self.observer(item)
        verdict = combine([Verdict.PASS, *(e.verdict for e in endings if not _is_skip(e))])
        if verdict is Verdict.PASS and endings:
            verdict = Verdict.SKIP
        ending = next((e for e in endings if e.verdict is verdict), None)
        duration_s = item.stash[_DURATION]
        outcome = Outcome(
            requirements=_marked(item, REQUIREMENT),
            test=_test_name(item),
            verdict=verdict,
            reason=ending.reason if ending else observer.conclusion,
            evidence=observer.evidence,
            duration_s=round(duration_s, 3),
            details=ending.details if ending else "",
            console_tail=ending.console_tail if ending else "",
            started_s=round(item.stash[_BEGAN][0], 3),
            console=self._consoles_since(item.stash[_BEGAN][1]),
        )
        if observer.parts:
            parts = observer.parts if verdict is Verdict.PASS else (*observer.parts, outcome)
            self.outcomes += parts
            self._on_parts(outcome.test, parts)
        else:
            self._emit(outcome)
        lost = any(ending.verdict is Verdict.LOST for ending in endings)
        spoilt = any(ending.spoilt for ending in endings)
        for rack in self.pool.all():
            try:
                if rack.is_dead or (lost and rack.touched):
                    rack.lost(_test_name(item))
                elif spoilt and rack.touched and rack.ours:
                    rack.renew()
            except Exception as failure:  # the tests that follow still have their say
                self._emit_failed_end(failure)
            rack.touched = False

    def _console_sizes(self) -> dict[tuple[str, str], int]:
        return {key: n for rack in self.pool.all() for key, n in rack.console_sizes().items()}

    def _consoles_since(self, before: dict[tuple[str, str], int]) -> tuple[ConsoleSpan, ...]:
        """Where the consoles that have said something since then have it in their logs."""
        return tuple(
            ConsoleSpan(*key, begin_bytes=before.get(key, 0), end_bytes=size)
            for key, size in self._console_sizes().items()
            if size > before.get(key, 0)
        )

    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> tuple[str, str, str] | None:
        """LOST and ERROR have words of their own in pytest's own output too."""
        word = getattr(report, _VERDICT, None)
        if word is Verdict.LOST:
            return "lost", "L", "LOST"
        if word is Verdict.ERROR:
            return "error", "E", "ERROR"
        return None

    # The end

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Ctrl-C: the tests not yet run have no outcome. Pytest's own stop is none."""
        self.interrupted = not isinstance(excinfo.value, pytest.Session.Interrupted)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """End the racks; a rack that will not end is an ERROR of the run."""
        self._announce(len(self.outcomes))
        for failure in self.pool.close(wait=not self.interrupted):
            self._emit_failed_end(failure)
        self.devices.extend(self.pool.devices())
        self._on_end(self)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """pytest shows failures and errors; what was LOST would have no place."""
        lost = [outcome for outcome in self.outcomes if outcome.verdict is Verdict.LOST]
        if lost:
            terminalreporter.section("LOST")
        for outcome in lost:
            terminalreporter.line(f"{outcome.title}: {outcome.reason}")
            for line in outcome.console_tail.splitlines():
                terminalreporter.line(f"    {line}")

    def _emit_failed_end(self, failure: Exception) -> None:
        self._emit(Outcome((), "end of the rack", Verdict.ERROR, _first_line(str(failure))))

    def _announce(self, tests: int) -> None:
        if not self._planned:
            self._planned = True
            self._on_plan(tests + len(self.outcomes))
            for outcome in self.outcomes:
                self._on_outcome(outcome)

    def _emit(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._on_outcome(outcome)


def _ending_of(report: pytest.TestReport, call: pytest.CallInfo[None]) -> _Ending | None:
    if call.excinfo is None:
        return _Ending(Verdict.FAIL, _first_line(report.longreprtext)) if report.failed else None
    error = call.excinfo.value
    reason = _first_line(str(error)) or type(error).__name__
    details = details_of(error)
    verdict = Verdict.ERROR
    match error:
        case LostError():
            return _Ending(Verdict.LOST, error.message, console_tail=error.console_tail)
        case CapabilityMissing() | pytest.skip.Exception():
            verdict, details = Verdict.SKIP, ""
        case _ if hasattr(report, "wasxfail"):
            verdict, details = Verdict.SKIP, ""
        case pytest.fail.Exception() if "from pytest-timeout" in reason:
            reason = f"the test did not end: {reason}"
        case AssertionError() | pytest.fail.Exception():
            verdict = Verdict.FAIL
        case _:
            reason = f"{type(error).__name__}: {reason}"
    return _Ending(verdict, reason, details, spoilt=isinstance(error, ModuleStays))


def _was_interrupted(error: BaseException | None) -> bool:
    """Ctrl-C came first, and what a test did to clean up after it failed."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _is_skip(ending: _Ending) -> bool:
    return ending.verdict is Verdict.SKIP


def _marked(item: pytest.Item, name: str) -> tuple[str, ...]:
    """The identifiers given to the marker, nearest first, each once."""
    words = (str(word) for marker in item.iter_markers(name) for word in marker.args)
    return tuple(dict.fromkeys(words))


def _test_name(item: pytest.Item) -> str:
    return item.name.removeprefix("test_")


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
