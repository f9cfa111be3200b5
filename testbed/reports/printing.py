# SPDX-License-Identifier: Apache-2.0
"""A finding for a person: what held, what it rests on, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from testbed.errors import ExitCode
from testbed.reports.judge import Word
from testbed.reports.load import Case
from testbed.reports.reproduce import Finding
from testbed.results.ktap import one_line

_STYLES = {
    Word.REPRODUCED: "bold red",
    Word.FIXED: "green",
    Word.DIFFERENT: "bold yellow",
    Word.SKIP: "yellow",
    Word.LOST: "bold magenta",
    Word.ERROR: "bold cyan",
}
_SIDES = {"as_reported": "as reported", "when_fixed": "when fixed"}


def lines(case: Case, finding: Finding) -> Iterator[str]:
    """The finding, line by line."""
    settings = "".join(f" {name}={value}" for name, value in case.variables.items())
    yield f"{finding.word} {case.name}{settings} ({finding.duration_s:.1f} s)"
    yield f"  {case.report.title}"
    yield f"  {case.report.link}"
    if not finding.held:
        yield f"  {finding.reason}"
    for side, words in _SIDES.items():
        held = [each for each in finding.held if each.expectation == side]
        if held:
            yield f"  {words}:"
        for each in held:
            yield f"    {'yes' if each.holds else 'no '} {each.name}"
            yield f"        {one_line(each.reason)}"
    if finding.evidence:
        yield "  seen:"
    for item in finding.evidence:
        yield f"    {one_line(str(item))}"
    for line in (finding.details or finding.console_tail).splitlines():
        yield f"  | {line}"


def print_table(
    findings: Sequence[tuple[Case, Finding]], run_dir: Path, code: ExitCode, console: Console
) -> None:
    """One row a report; ``console`` should write to standard error."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("report", no_wrap=True)
    table.add_column("word", no_wrap=True)
    table.add_column("seconds", justify="right")
    table.add_column("what was seen", overflow="fold")
    for case, finding in findings:
        table.add_row(
            case.name,
            Text(finding.word, style=_STYLES[finding.word]),
            f"{finding.duration_s:.1f}",
            Text(one_line(finding.reason)),
        )
    console.print(table)
    console.print(Text(f"exit {int(code)}; everything is in {run_dir}"), soft_wrap=True)
