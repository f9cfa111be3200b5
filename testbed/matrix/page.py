# SPDX-License-Identifier: Apache-2.0
"""A matrix as one HTML file: the table, the reasons, and the way to each cell's page and logs.

Each cell has the page of its run (:mod:`testbed.page.render`) beside its record, made where it ran.
The pages link to one another relatively: the folder can be moved, packed and sent as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from testbed.errors import TestbedError
from testbed.matrix.records import MATRIX_FILE, CellRecord, MatrixRecord, load_matrix
from testbed.matrix.store import CELLS, RUN_FOLDER
from testbed.matrix.table import grid, reasons, summary, whole, word
from testbed.page.document import document
from testbed.page.files import is_file
from testbed.results.record import FILE_NAME, write_atomically
from testbed.results.verdicts import Verdict

PAGE_FILE = "index.html"
CELL_PAGE = "page.html"
_ATTEMPT = re.compile(rf"{CELLS}/[^/]+/[0-9]+")


def write_cell_page(run_dir: Path) -> str:
    """The page of a cell's run, in its folder; returns why there is none, or ""."""
    from testbed.page.render import render  # noqa: PLC0415  slow, and not of every process

    try:
        write_atomically(run_dir / CELL_PAGE, render(run_dir).encode(errors="replace"))
    except (TestbedError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def remake(folder: Path) -> tuple[str, list[str]]:
    """The matrix's page, after the page of each of its runs; for the folder of an earlier run.

    :returns: with the cells that have none, and why.
    :raises InputError: it is no matrix's folder, or its record cannot be read.
    """
    record = load_matrix(folder / MATRIX_FILE)
    problems = []
    for cell in record.cells:
        run_dir = _run_of(cell, folder)
        if run_dir is not None and (why_not := write_cell_page(run_dir)):
            problems.append(f"{cell.name}: {why_not}")
    return to_html(record, folder), problems


def to_html(record: MatrixRecord, folder: Path) -> str:
    """The page, for ``folder``; every word of a record is escaped."""
    links = {cell.name: link for cell in record.cells if (link := _link(cell, folder))}
    return document(
        "matrix.html.j2",
        r=record,
        g=grid(record),
        word=word,
        told=reasons(record),
        summary=summary(record, "the folder of this page"),
        whole=whole(record),
        counts=_counts(record),
        links=links,
        opened=lambda cells: next(_openable(cells, links), None),
    )


def _openable(cells: list[CellRecord], links: dict[str, str]) -> Iterator[str]:
    """Of several repetitions the worst first, as is said in their place."""
    verdict = word(cells)[1]
    for cell in sorted(cells, key=lambda cell: cell.verdict is not verdict):
        if cell.name in links:
            yield links[cell.name]


def _counts(record: MatrixRecord) -> dict[Verdict, int]:
    verdicts = [cell.verdict for cell in record.cells]
    return {verdict: n for verdict in Verdict if (n := verdicts.count(verdict))}


def _run_of(cell: CellRecord, folder: Path) -> Path | None:
    """Its run's folder, if it left a record; never one outside of the matrix's."""
    if not _ATTEMPT.fullmatch(cell.folder) or ".." in cell.folder:
        return None
    run_dir = folder / cell.folder / RUN_FOLDER
    return run_dir if is_file(run_dir / FILE_NAME) else None


def _link(cell: CellRecord, folder: Path) -> str:
    """What opens when its place is chosen: the page of its run, else what it left."""
    if not _ATTEMPT.fullmatch(cell.folder) or ".." in cell.folder:
        return ""
    page = folder / cell.folder / RUN_FOLDER / CELL_PAGE
    place = quote(cell.folder)
    return f"{place}/{RUN_FOLDER}/{CELL_PAGE}" if is_file(page) else f"{place}/"
