# SPDX-License-Identifier: Apache-2.0
"""What a program of kvm-unit-tests says on the serial port, as outcomes. Pure; it never raises.

Sources: kvm-unit-tests' ``lib/report.c`` (a line for each check, then SUMMARY) and
``lib/x86/io.c`` (its exit status through ``isa-debug-exit``: QEMU ends with 2 * status + 1).

======================================  =========================================================
``PASS:``                               PASS
``FAIL:``, ``XPASS:``                   FAIL (XPASS: it was expected to fail and did not)
``SKIP:``, ``XFAIL:``, ``KFAIL:``       SKIP, with the line
status 1 without a FAIL line            FAIL
status 77/2 (all skipped), no lines     SKIP
other status; ABORT; a count of         LOST: what was not shown was not refuted either
 checks that the summary contradicts
no SUMMARY; QEMU died; the deadline     LOST
======================================  =========================================================

Each line is one outcome, ``program/what it checks``; what concerns the program is one more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from testbed.results.evidence import Note
from testbed.results.ktap import one_line
from testbed.results.verdicts import Outcome, Verdict

_LINE = re.compile(r"(PASS|FAIL|XPASS|XFAIL|KFAIL|SKIP): (.*)$")
_SUMMARY = re.compile(r"SUMMARY: ([0-9]{1,9}) tests\b")
_ABORT = re.compile(r"ABORT: .*$|Unhandled (?:cpu )?exception.*$")
_VERDICTS = {
    "PASS": Verdict.PASS,
    "FAIL": Verdict.FAIL,
    "XPASS": Verdict.FAIL,
    "XFAIL": Verdict.SKIP,
    "KFAIL": Verdict.SKIP,
    "SKIP": Verdict.SKIP,
}
_PASSED, _FAILED, _ALL_SKIPPED = 1, 3, 77  # of QEMU
_TAIL_LINES = 15


@dataclass(frozen=True)
class MachineEnd:
    """How the machine ended: QEMU's status, or None and why it has none."""

    status: int | None
    reason: str = ""


def read_report(program: str, text: str, end: MachineEnd) -> tuple[Outcome, ...]:
    """The outcomes of ``program``, which printed ``text``; at least one.

    If there is something to say of the program as a whole, it is the last, under its own name.
    """
    lines = [line.strip() for line in text.splitlines()]
    found = []
    for line in lines:
        if matched := _LINE.match(line):
            word, what = matched.groups()
            reason = {"PASS": "", "FAIL": what, "SKIP": what}.get(word, line)
            found.append(
                Outcome(
                    (),
                    f"{program}/{one_line(what)}",
                    _VERDICTS[word],
                    one_line(reason),
                    (Note(line),),
                )
            )
    verdict, reason = _whole(lines, found, end)
    if verdict is Verdict.PASS and found:
        return tuple(found)
    tail = tuple(map(Note, (line for line in lines[-_TAIL_LINES:] if line)))
    return (*found, Outcome((), program, verdict, reason, tail))


def _whole(lines: list[str], found: list[Outcome], end: MachineEnd) -> tuple[Verdict, str]:
    """PASS: the lines say everything."""
    aborted = next((m for line in lines if (m := _ABORT.match(line))), None)
    planned = next((int(m[1]) for line in lines if (m := _SUMMARY.match(line))), None)
    failed = any(outcome.verdict is Verdict.FAIL for outcome in found)
    ends: tuple[tuple[bool, Verdict, str], ...] = (
        (end.status is None, Verdict.LOST, end.reason),
        (
            aborted is not None,
            Verdict.LOST,
            f"it gave up: {one_line(aborted[0] if aborted else '')}",
        ),
        (
            end.status not in (_PASSED, _FAILED, _ALL_SKIPPED),
            Verdict.LOST,
            f"QEMU ended with status {end.status}, which is no result",
        ),
        (
            end.status == _FAILED and not failed,
            Verdict.FAIL,
            "its exit status says that a check failed",
        ),
        (
            end.status != _FAILED and failed,
            Verdict.ERROR,
            "its exit status contradicts its lines",
        ),
        (
            end.status == _ALL_SKIPPED and not found,
            Verdict.SKIP,
            "it has skipped everything",
        ),
        (planned is None, Verdict.LOST, "it ended without a summary"),
        # Checks may be counted without a line (report_pass()), no line without being counted.
        (
            planned is not None and planned < len(found),
            Verdict.LOST,
            f"its summary counts {planned} checks, it has shown {len(found)}",
        ),
    )
    return next(((verdict, why) for holds, verdict, why in ends if holds), (Verdict.PASS, ""))
