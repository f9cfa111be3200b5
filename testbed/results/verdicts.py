# SPDX-License-Identifier: Apache-2.0
"""The five ends of a test, and how they combine. Pure.

======  ===================================================================  ====
PASS    what the requirement says was shown                                     0
FAIL    it was shown not to hold                                                1
SKIP    it cannot be shown here; the reason names the missing capability      125
LOST    the machine or the link to it died: neither shown nor refuted           3
ERROR   the testbed's own fault                                               128
======  ===================================================================  ====

Several outcomes of one requirement, or of one run, combine to the worst: ``FAIL > LOST > ERROR >
PASS > SKIP``. A FAIL stands whatever else happened; a PASS stands only if nothing was lost or went
wrong beside it; SKIP remains only where everything was skipped, and then the process answers 125,
which tells ``git bisect run`` that this commit cannot be judged. (128 makes it stop.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from testbed.errors import ExitCode
from testbed.results.evidence import Evidence


class Verdict(StrEnum):
    """Five words, five different ends. Nothing but PASS is success."""

    PASS = "PASS"  # noqa: S105  # a verdict, no password
    FAIL = "FAIL"
    SKIP = "SKIP"
    LOST = "LOST"
    ERROR = "ERROR"


_WORST_FIRST = (Verdict.FAIL, Verdict.LOST, Verdict.ERROR, Verdict.PASS, Verdict.SKIP)

_EXIT_CODES = {
    Verdict.PASS: ExitCode.PASS,
    Verdict.FAIL: ExitCode.FAIL,
    Verdict.SKIP: ExitCode.SKIP,
    Verdict.LOST: ExitCode.LOST,
    Verdict.ERROR: ExitCode.ERROR,
}


@dataclass(frozen=True)
class ConsoleSpan:
    """How many bytes the console log of a machine had when a test began, and when it ended.

    ``rack`` is the rack's folder in the run: ``rack``, ``rack-scalable``.
    """

    rack: str
    node: str
    begin_bytes: int
    end_bytes: int


@dataclass(frozen=True)
class Outcome:
    """How one test ended.

    ``requirements``  the identifiers that it shows (``MAP-03``); empty for a test with none.
    ``test``          its name, unique in the run.
    ``reason``        one line: why it failed, was skipped, lost …; for a PASS what was shown.
    ``details``       more lines for a person (a traceback of an ERROR), or "".
    ``console_tail``  the last lines of the lost machine's console.
    ``started_s``     when it began, in seconds since 1970; 0 if nobody noted it.
    ``console``       what was written on consoles meanwhile: where it is in their logs.
    """

    requirements: tuple[str, ...]
    test: str
    verdict: Verdict
    reason: str = ""
    evidence: tuple[Evidence, ...] = ()
    duration_s: float = 0.0
    details: str = ""
    console_tail: str = ""
    started_s: float = 0.0
    console: tuple[ConsoleSpan, ...] = ()

    @property
    def title(self) -> str:
        """``MAP-03 raw_bar_address[gpu0-gpu1]``."""
        return " ".join([*self.requirements, self.test])


@dataclass(frozen=True)
class RequirementResult:
    """What all tests of one requirement say together; ``tests`` counts them by verdict."""

    requirement: str
    verdict: Verdict
    reason: str
    tests: dict[Verdict, int]


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of them (see the module's docstring).

    Raises:
        ValueError: there are none.
    """
    present = set(verdicts)
    for verdict in _WORST_FIRST:
        if verdict in present:
            return verdict
    raise ValueError("no verdict to combine")


def code_of(verdict: Verdict) -> ExitCode:
    """What the process answers for a verdict."""
    return _EXIT_CODES[verdict]


def exit_code(outcomes: Iterable[Outcome]) -> ExitCode:
    """What the process answers for a run; a run without a single test is bad input."""
    verdicts = [outcome.verdict for outcome in outcomes]
    return _EXIT_CODES[combine(verdicts)] if verdicts else ExitCode.BAD_INPUT


def by_requirement(outcomes: Iterable[Outcome]) -> tuple[RequirementResult, ...]:
    """One result for each requirement named, in the order of identifiers.

    The reason is that of the first test which ended with the requirement's verdict.
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for requirement in outcome.requirements:
            groups.setdefault(requirement, []).append(outcome)
    results = []
    for requirement in sorted(groups):
        group = groups[requirement]
        verdict = combine(outcome.verdict for outcome in group)
        reason = next(outcome.reason for outcome in group if outcome.verdict is verdict)
        counts = {v: sum(outcome.verdict is v for outcome in group) for v in Verdict}
        results.append(
            RequirementResult(
                requirement, verdict, reason, {v: count for v, count in counts.items() if count}
            )
        )
    return tuple(results)


def count(outcomes: Iterable[Outcome]) -> dict[Verdict, int]:
    """How many tests ended how; every verdict is a key."""
    verdicts = [outcome.verdict for outcome in outcomes]
    return {verdict: verdicts.count(verdict) for verdict in Verdict}
