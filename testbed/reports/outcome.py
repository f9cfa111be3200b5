# SPDX-License-Identifier: Apache-2.0
"""Findings as outcomes, exit codes and records. Pure.

=============  ======================  ===============  ==================================
word           exit code (bisecting)   with ``expect``  means
=============  ======================  ===============  ==================================
FIXED          0, good                 0 or 1           what the report wants when fixed
REPRODUCED     1, bad                  1 or 0           what the report saw
DIFFERENT      125, skip               1                neither: what happened is said
SKIP           125, skip               125              a capability is missing; it is named
LOST           125, skip               3                the machine died, not as reported
ERROR          128, stops a bisection  128              the testbed's own fault
=============  ======================  ===============  ==================================

A bisection looks for one bug. A commit on which the machine does not boot, or something else goes
wrong, is neither good nor bad, so that it is skipped; someone who knows what must come out says so
with ``expect``, and then everything else has a code of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from testbed.errors import ExitCode
from testbed.reports.judge import Word
from testbed.reports.load import Case
from testbed.reports.reproduce import Finding
from testbed.results import verdicts
from testbed.results.report_record import ConditionRecord, ReportRecord, StepRecord
from testbed.results.verdicts import Outcome, Verdict

_UNJUDGED = {Word.SKIP: Verdict.SKIP, Word.LOST: Verdict.LOST, Word.ERROR: Verdict.ERROR}


def verdict_of(word: Word, expect: Word = Word.FIXED) -> Verdict:
    """PASS if it is the word that was wanted; a fixed bug unless said otherwise."""
    if word in _UNJUDGED:
        return _UNJUDGED[word]
    return Verdict.PASS if word is expect else Verdict.FAIL


def outcome_of(case: Case, finding: Finding, expect: Word | None) -> Outcome:
    """For a run's record and JUnit file."""
    return Outcome(
        (),
        case.name,
        verdict_of(finding.word, expect or Word.FIXED),
        f"{finding.word}: {finding.reason}",
        finding.evidence,
        round(finding.duration_s, 3),
        finding.details,
        finding.console_tail,
    )


def exit_code(words: Iterable[Word], expect: Word | None) -> ExitCode:
    """See the module; of several reports the worst."""
    found = set(words)
    if expect is not None:
        return verdicts.exit_code(Outcome((), "", verdict_of(word, expect)) for word in found)
    if Word.REPRODUCED in found:
        return ExitCode.FAIL
    if Word.ERROR in found:
        return ExitCode.ERROR
    return ExitCode.PASS if found == {Word.FIXED} else ExitCode.SKIP


def record_of(case: Case, finding: Finding, expect: Word | None) -> ReportRecord:
    """For the run's record."""
    return ReportRecord(
        file=case.file,
        title=case.report.title,
        link=case.report.link,
        word=finding.word,
        reason=finding.reason,
        expected=expect or "",
        variables=dict(case.variables),
        stand_ins=case.report.stand_ins,
        conditions=tuple(
            ConditionRecord(each.expectation, each.name, each.holds, each.reason)
            for each in finding.held
        ),
        steps=tuple(
            StepRecord(each.number, each.words, dict(each.values), round(each.duration_s, 3))
            for each in finding.steps
        ),
        boot_s=round(finding.boot_s, 3),
        duration_s=round(finding.duration_s, 3),
    )
