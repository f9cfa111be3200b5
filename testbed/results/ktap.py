# SPDX-License-Identifier: Apache-2.0
"""KTAP version 1 on standard output, as it happens: one line a test.

The format is the kernel's (Documentation/dev-tools/ktap.rst). PASS is ``ok``, SKIP is ``ok …
# SKIP reason``. FAIL, LOST and ERROR are ``not ok``: FAIL bare, LOST as ``# LOST reason`` and ERROR
as ``# ERROR reason``, so that a reader that knows only ``ok`` and ``not ok`` is right, and one that
reads directives can tell a refuted requirement from a dead machine. Diagnostic lines (``#``) before
a ``not ok`` say what was seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TextIO

from testbed.results.verdicts import Outcome, Verdict, combine

_MAX_LINES = 40


class KtapStream:
    """Writes each outcome when it is there, and flushes: a reader may wait for it."""

    def __init__(self, stream: TextIO, indent: str = "", name: str = "") -> None:
        self._stream = stream
        self._name = name
        self._indent = indent
        self._number = 0
        self._planned: int | None = None

    def plan(self, tests: int) -> None:
        """The header; once, before the first outcome."""
        self._planned = tests
        subtest = [f"# Subtest: {self._name}"] if self._name else []
        self._write("KTAP version 1", *subtest, f"1..{tests}")

    def outcome(self, outcome: Outcome) -> None:
        """One test ended."""
        self._number += 1
        self._write(*_diagnostics(outcome), _result_line(self._number, outcome))

    def subtest(self, name: str) -> KtapStream:
        """A stream for tests that together are the next one of this stream."""
        return KtapStream(self._stream, self._indent + "  ", name)

    def subtest_ended(self, name: str, outcomes: Sequence[Outcome]) -> None:
        """The result line that a subtest ends with."""
        verdict = combine(o.verdict for o in outcomes) if outcomes else Verdict.SKIP
        reason = "" if verdict in (Verdict.PASS, Verdict.FAIL) else "see its tests"
        self._number += 1
        self._write(_result_line(self._number, Outcome((), name, verdict, reason)))

    def parts(self, name: str, outcomes: Sequence[Outcome]) -> None:
        """A whole subtest at once, and its result."""
        below = self.subtest(name)
        below.plan(len(outcomes))
        for outcome in outcomes:
            below.outcome(outcome)
        self.subtest_ended(name, outcomes)

    def end(self, note: str = "") -> None:
        """Nothing more will come; says so where tests of the plan were not run."""
        missing = (self._planned or 0) - self._number
        if missing > 0:
            self._write(f"# {missing} of {self._planned} tests not run")
        if note:
            self._write(f"# {one_line(note)}")

    def _write(self, *lines: str) -> None:
        self._stream.write("".join(f"{self._indent}{line}\n" for line in lines))
        self._stream.flush()


def one_line(text: str) -> str:
    """``text`` without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _result_line(number: int, outcome: Outcome) -> str:
    # A '#' in a name would start a directive.
    line = f"{number} {one_line(outcome.title).replace('#', '_')}"
    match outcome.verdict:
        case Verdict.PASS:
            return f"ok {line}"
        case Verdict.FAIL:
            return f"not ok {line}"
        case Verdict.SKIP:
            return f"ok {line} # SKIP {one_line(outcome.reason)}".rstrip()
        case Verdict.LOST | Verdict.ERROR as verdict:
            return f"not ok {line} # {verdict} {one_line(outcome.reason)}".rstrip()


def _diagnostics(outcome: Outcome) -> Iterator[str]:
    if outcome.verdict in (Verdict.PASS, Verdict.SKIP):
        return
    if outcome.verdict is Verdict.FAIL:
        yield f"# FAIL {one_line(outcome.reason)}"
    lines = [
        *map(str, outcome.evidence),
        *outcome.details.splitlines(),
        *(f"console: {line}" for line in outcome.console_tail.splitlines()),
    ]
    yield from (f"#   {one_line(line)}" for line in lines[-_MAX_LINES:])
