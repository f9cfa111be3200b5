# SPDX-License-Identifier: Apache-2.0
"""What a test program says in KTAP, as outcomes. Pure; it never raises, whatever it is given.

Sources: the kernel's Documentation/dev-tools/ktap.rst, and kselftest's exit statuses
(tools/testing/selftests/kselftest.h: 0 pass, 1 fail, 2 expected failure, 4 skip).

======================================  =========================================================
``ok``                                  PASS; FAIL, LOST or ERROR if one of its subtests is
``not ok``                              FAIL
``# SKIP``, ``# TODO``, ``# XFAIL``     SKIP (``ok … # TODO`` is a PASS); the directive is the
                                        reason
``# TIMEOUT``, ``# LOST``               LOST
``# ERROR``                             ERROR
an unknown directive                    as if it were not there
fewer results than planned              LOST: the others were neither shown nor refuted
more results than planned               ERROR
a signal, or a deadline, or the         LOST, with the lines before it
machine's end
``Bail out!``                           FAIL if the program then says so with its status
exit status 1 without a ``not ok``      FAIL
not one KTAP line                       by the exit status alone, as kselftest's own runner does
======================================  =========================================================

Each result line is one outcome, named by its path (``vfio_test/parent/child``). What concerns the
program as a whole is one more and the last, under the program's name, if there is something to say.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from testbed.results.evidence import Note
from testbed.results.ktap import one_line
from testbed.results.verdicts import Outcome, Verdict, combine

_VERSION = re.compile(r"K?TAP version [0-9]+\s*$")
_PLAN = re.compile(r"1\.\.([0-9]{1,9})\s*(?:#\s*(.*))?$")
# A "not ok" without a number counts; an "ok" without one may be any sentence.
_RESULT = re.compile(r"(?:(not ok)(?:\s+([0-9]{1,9}))?|ok\s+([0-9]{1,9}))(?:\s+(.*))?$")
_BAIL_OUT = "Bail out!"
_SUBTEST = re.compile(r"# Subtest:\s*(.+)$")

_MAX_LINES = 40
_MAX_CHARACTERS = 300
_MAX_INDENT = 32
_PASSED, _XFAIL, _SKIPPED, _NOT_STARTED = 0, 2, 4, (126, 127)
_BAD = (Verdict.FAIL, Verdict.LOST, Verdict.ERROR)


@dataclass(frozen=True)
class Ending:
    """How a program ended.

    ``status``  its exit status, 128 + N if signal N killed it; None if it never ended.
    ``reason``  why it never did: the deadline, the machine's death.
    """

    status: int | None
    reason: str = ""

    @property
    def signal(self) -> str:
        """``SIGSEGV``, or "" if no signal ended it."""
        try:
            return signal.Signals((self.status or 0) - 128).name
        except ValueError:
            return ""


def read_ktap(program: str, text: str, ending: Ending) -> tuple[Outcome, ...]:
    """The outcomes of ``program``, which printed ``text``; at least one.

    If its end has no status, the last of them is the program's own.

    :param text: standard output and error as they came.
    """
    reader = _Reader()
    for line in text.splitlines():
        reader.take(line)
    found = reader.finish()
    whole = _whole(program, reader, found, ending)
    prefixed = [replace(outcome, test=f"{program}/{outcome.test}") for outcome in found]
    return (*prefixed, *whole)


@dataclass
class _Level:
    """The tests at one indentation."""

    indent: int
    name: str = ""
    planned: int | None = None
    results: int = 0
    below: list[Outcome] = field(default_factory=list)  # subtests whose parent has not come yet
    done: list[Outcome] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # since the last result


class _Reader:
    def __init__(self) -> None:
        self.bail_out: str | None = None
        self.plan_skipped: str | None = None
        self.mismatch: tuple[Verdict, str] | None = None  # of results and plan, at the first level
        self.spoke = False  # KTAP, of any kind
        self.results = 0  # of the first level
        self.refusals = 0  # that result lines tell, at any level
        self.planned: int | None = None
        self.tail: list[str] = []
        self._levels: list[_Level] = []
        self._finished: list[Outcome] = []

    def take(self, raw: str) -> None:
        """The next line."""
        line = raw.expandtabs().rstrip()
        content = line.lstrip(" ")
        if not content:
            return
        indent = min(len(line) - len(content), _MAX_INDENT)
        self.tail = [*self.tail, one_line(line)[:_MAX_CHARACTERS]][-_MAX_LINES:]
        if _VERSION.match(content):
            self._begin(indent)
        elif plan := _PLAN.match(content):
            self._plan(self._level(indent), int(plan[1]), plan[2] or "")
        elif result := _RESULT.match(content):
            level = self._level(indent)
            self._result(level, result)
        elif content.startswith(_BAIL_OUT):
            self.spoke = True
            self.bail_out = one_line(content.removeprefix(_BAIL_OUT))
        elif self._levels:
            level = self._levels[-1]
            if named := _SUBTEST.match(content):
                level.name = one_line(named[1])
            level.lines = [*level.lines, self.tail[-1]][-_MAX_LINES:]

    def finish(self) -> list[Outcome]:
        """All outcomes; nothing more will come."""
        while self._levels:
            self._close()
        return self._finished

    def _level(self, indent: int) -> _Level:
        """The level of a line; deeper ones have ended, a deeper one begins."""
        self.spoke = True
        while self._levels and self._levels[-1].indent > indent:
            self._close()
        if not self._levels or self._levels[-1].indent < indent:
            self._levels.append(_Level(indent))
        return self._levels[-1]

    def _begin(self, indent: int) -> None:
        level = self._level(indent)
        if level.results or level.planned is not None:  # another document at the same place
            self._close()
            self._level(indent)

    def _plan(self, level: _Level, tests: int, note: str) -> None:
        level.planned = tests
        if len(self._levels) == 1:
            self.planned = tests
            if tests == 0:
                self.plan_skipped = _verdict(False, one_line(note))[1] or "a plan of no tests"

    def _result(self, level: _Level, result: re.Match[str]) -> None:
        level.results += 1
        if len(self._levels) == 1:
            self.results += 1
        description, _, directive = (result[4] or "").partition("#")
        number = result[2] or result[3] or str(level.results)
        name = one_line(description.strip().removeprefix("- ")) or number
        verdict, reason = _verdict(bool(result[1]), one_line(directive))
        worse = [o for o in level.below if o.verdict in _BAD]
        if worse and verdict not in _BAD:
            first = next(o for o in worse if o.verdict is combine(o.verdict for o in worse))
            verdict = first.verdict
            reason = f"its subtest {first.test} ended {verdict}: {first.reason}"
        self.refusals += verdict in _BAD
        evidence = tuple(Note(line) for line in [*level.lines, self.tail[-1]])
        level.done += _below(name, level.below)
        level.done.append(Outcome((), name, verdict, reason, evidence))
        level.below, level.lines = [], []

    def _close(self) -> None:
        """The deepest level has ended: its outcomes wait for their parent's result."""
        level = self._levels.pop()
        outcomes = [*level.done, *_below(level.name or "subtests", level.below)]
        mismatch = None
        if level.planned is not None and level.results != level.planned:
            mismatch = (
                Verdict.LOST if level.results < level.planned else Verdict.ERROR,
                f"{level.results} results came, {level.planned} were planned",
            )
        if self._levels:
            if mismatch:
                evidence = tuple(Note(line) for line in level.lines)
                outcomes.append(Outcome((), level.name or "plan", *mismatch, evidence))
            self._levels[-1].below += outcomes
        else:
            self.mismatch = self.mismatch or mismatch
            self._finished += outcomes


def _below(parent: str, outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [replace(outcome, test=f"{parent}/{outcome.test}") for outcome in outcomes]


def _verdict(refused: bool, directive: str) -> tuple[Verdict, str]:
    word, _, rest = directive.partition(" ")
    word = word.rstrip(":").upper()
    if word in ("SKIP", "SKIPPED"):
        return Verdict.SKIP, rest or "no reason given"
    if word in ("TIMEOUT", "LOST"):
        return Verdict.LOST, directive
    if word == "ERROR":
        return Verdict.ERROR, rest or "no reason given"
    if word == "XFAIL" or (word == "TODO" and refused):
        return Verdict.SKIP, f"expected to fail: {rest}" if rest else "expected to fail"
    if refused:
        return Verdict.FAIL, directive or "not ok"
    return Verdict.PASS, directive


def _whole(
    program: str, reader: _Reader, found: Sequence[Outcome], ending: Ending
) -> tuple[Outcome, ...]:
    """What is to be said of the program beside its tests."""
    last = reader.tail[-1] if reader.tail else "it said nothing"
    verdict, reason = (
        _cut_short(reader, ending)
        or _by_status(reader, found, ending.status or _PASSED, last)
        or (reader.mismatch if found else _without_results(reader))
        or (None, "")
    )
    if verdict is None:
        return ()
    plan = "" if reader.planned is None else f" of {reader.planned}"
    tests = f" after {reader.results}{plan} tests" if ending.status is None or ending.signal else ""
    evidence = tuple(Note(line) for line in reader.tail)
    return (Outcome((), program, verdict, reason + tests, evidence),)


_End = tuple[Verdict, str] | None


def _cut_short(reader: _Reader, ending: Ending) -> _End:
    """It did not come to its own end."""
    if ending.status is None:
        return Verdict.LOST, ending.reason or "it never ended"
    if ending.signal:
        return Verdict.LOST, f"killed by {ending.signal}"
    if reader.bail_out is None:
        return None
    by_status = {_PASSED: Verdict.ERROR, _SKIPPED: Verdict.SKIP}
    said = reader.bail_out or "no reason given"
    return by_status.get(ending.status, Verdict.FAIL), f"it gave up: {said}"


def _by_status(reader: _Reader, found: Sequence[Outcome], status: int, last: str) -> _End:
    """Its exit status says what no result line did."""
    if status == _PASSED or reader.refusals:
        return None
    if status in (_SKIPPED, _XFAIL):
        word = "skip" if status == _SKIPPED else "expected to fail"
        return None if found else (Verdict.SKIP, reader.plan_skipped or f"{word}: {last}")
    if status in _NOT_STARTED and not found:
        return Verdict.ERROR, f"it could not be started: {last}"
    return Verdict.FAIL, f"exit status {status}: {last}"


def _without_results(reader: _Reader) -> _End:
    if reader.plan_skipped is not None:
        return Verdict.SKIP, reader.plan_skipped
    if reader.spoke:
        return Verdict.ERROR, "it announced tests and gave no result"
    return Verdict.PASS, "exit status 0; it says nothing in KTAP"
