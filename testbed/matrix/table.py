# SPDX-License-Identifier: Apache-2.0
"""The one table of a matrix: a row for each rack and setting, a column for each suite. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from testbed.errors import ExitCode
from testbed.matrix.records import CellRecord, MatrixRecord
from testbed.results.table import STYLES
from testbed.results.verdicts import Verdict, combine

SUITE = "suite"
_REASONS = 40


@dataclass(frozen=True)
class Row:
    """A combination of everything but the suite, and its cells by suite."""

    values: tuple[str, ...]
    cells: dict[str, list[CellRecord]] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """The table as values: ``axes`` head the first columns, ``suites`` the others."""

    axes: tuple[str, ...]
    suites: tuple[str, ...]
    rows: tuple[Row, ...]


def grid(record: MatrixRecord) -> Grid:
    """Cells in their places; axes with one value alone are left out."""
    axes = tuple(axis for axis in record.axes if axis != SUITE) or ("topology",)
    suites = tuple(dict.fromkeys(cell.values[SUITE] for cell in record.cells))
    rows: dict[tuple[str, ...], Row] = {}
    for cell in record.cells:
        values = tuple(cell.values[axis] or "-" for axis in axes)
        row = rows.setdefault(values, Row(values))
        row.cells.setdefault(cell.values[SUITE], []).append(cell)
    return Grid(axes, suites, tuple(rows.values()))


def word(cells: Sequence[CellRecord]) -> tuple[str, Verdict | None]:
    """What stands in one place: a verdict, of several repetitions the worst with their number."""
    if not cells:
        return "", None
    verdict = combine(cell.verdict for cell in cells)
    if len(cells) == 1:
        return str(verdict), verdict
    number = sum(cell.verdict is verdict for cell in cells)
    return f"{verdict} {number}/{len(cells)}", verdict


def reasons(record: MatrixRecord) -> list[tuple[CellRecord, str]]:
    """Every cell that is no PASS, with why; equal reasons of SKIPs only once."""
    found, said = [], set()
    for cell in record.cells:
        if cell.verdict is Verdict.PASS or not cell.reason:
            continue
        if cell.verdict is Verdict.SKIP:
            if cell.reason in said:
                continue
            said.add(cell.reason)
        found.append((cell, cell.reason))
    return found


def whole(record: MatrixRecord) -> str:
    """One word for all of it."""
    if record.exit_code == ExitCode.INTERRUPTED:
        return "INTERRUPTED"
    if record.missing and record.exit_code != ExitCode.FAIL:
        return "ERROR"
    return str(combine(cell.verdict for cell in record.cells)) if record.cells else "ERROR"


def summary(record: MatrixRecord, folder: object) -> str:
    """``FAIL: 11 pass, 1 fail in 200.3 s (exit 1); everything is in FOLDER``."""
    verdicts = [cell.verdict for cell in record.cells]
    numbers = ", ".join(f"{n} {v.lower()}" for v in Verdict if (n := verdicts.count(v)))
    head = whole(record) if verdicts or record.missing else "nothing ran"
    if record.missing:
        numbers += f", {record.missing} of {record.missing + len(verdicts)} not run"
        numbers += f" ({record.note})" if record.note else ""
    return (
        f"{head}: {numbers.removeprefix(', ')} in {record.duration_s:.1f} s"
        f" (exit {record.exit_code}); everything is in {folder}"
    )


def print_table(record: MatrixRecord, console: Console) -> None:
    """The table and the reasons."""
    found = grid(record)
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in (*found.axes, *found.suites):
        table.add_column(name, overflow="fold")
    for row in found.rows:
        places = [word(row.cells.get(suite, [])) for suite in found.suites]
        table.add_row(
            *map(Text, row.values),
            *(Text(text, style=STYLES[v] if v else "") for text, v in places),
        )
    console.print(table)
    told = reasons(record)
    for cell, reason in told[:_REASONS]:
        line = Text.assemble((str(cell.verdict), STYLES[cell.verdict]), f" {cell.name}: {reason}")
        console.print(line, soft_wrap=True)
    if len(told) > _REASONS:
        console.print(f"… and {len(told) - _REASONS} more; the page has all", soft_wrap=True)
