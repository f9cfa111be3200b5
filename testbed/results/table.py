# SPDX-License-Identifier: Apache-2.0
"""The table at a run's end, for a person, and one line that says where to look."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from testbed.errors import ExitCode
from testbed.results.ktap import one_line
from testbed.results.record import RunRecord, injected
from testbed.results.verdicts import Verdict, combine, count

_SHOWN = 3  # injected faults in the summary; the record has all

STYLES = {
    Verdict.PASS: "green",
    Verdict.FAIL: "bold red",
    Verdict.SKIP: "yellow",
    Verdict.LOST: "bold magenta",
    Verdict.ERROR: "bold cyan",
}


def print_table(record: RunRecord, run_dir: Path, console: Console) -> None:
    """One row a requirement, then :func:`summary`; ``console`` should write to standard error."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("requirement", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("tests", justify="right")
    table.add_column("what was seen", overflow="fold")
    for result in record.requirements:
        passed = result.tests.get(Verdict.PASS, 0)
        table.add_row(
            result.requirement,
            Text(result.verdict, style=STYLES[result.verdict]),
            f"{passed}/{sum(result.tests.values())}",
            Text(one_line(result.reason)),
        )
    console.print(table)
    for outcome in record.outcomes:
        if not outcome.requirements and outcome.verdict is not Verdict.PASS:
            console.print(
                Text(f"{outcome.verdict} ", style=STYLES[outcome.verdict]),
                Text(f"{outcome.test}: {one_line(outcome.reason)}"),
                sep="",
            )
    console.print(Text(summary(record, run_dir)), soft_wrap=True)


def summary(record: RunRecord, run_dir: Path) -> str:
    """``PASS: 14 pass, 1 skip in 5.2 s (exit 0); everything is in RUN_DIR``, or INTERRUPTED."""
    counts = count(record.outcomes)
    numbers = ", ".join(f"{n} {verdict.lower()}" for verdict, n in counts.items() if n)
    word = combine(o.verdict for o in record.outcomes) if record.outcomes else "no tests"
    if record.exit_code == ExitCode.INTERRUPTED:
        word = "INTERRUPTED"  # what had passed until then is no PASS of the run
    broken = f" with --break {record.mutation}" if record.mutation else ""
    broken += f" under --policy {record.policy}" if record.policy else ""
    faults = injected(record)
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        broken += f" with faults injected ({'; '.join(faults[:_SHOWN])}{more})"
    return (
        f"{word}: {numbers or 'nothing ran'} in {record.duration_s:.1f} s{broken}"
        f" (exit {record.exit_code}); everything is in {run_dir}"
    )
