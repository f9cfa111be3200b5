# SPDX-License-Identifier: Apache-2.0
"""A matrix as JUnit XML: a test suite for each cell, with its run's tests in it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from testbed.errors import InputError
from testbed.matrix.records import CellRecord, MatrixRecord
from testbed.matrix.store import RUN_FOLDER
from testbed.results.junit import suite_element
from testbed.results.record import FILE_NAME, load_record
from testbed.results.verdicts import Outcome


def to_junit(record: MatrixRecord, folder: Path) -> bytes:
    """The XML document; what each cell's run found is read from ``folder``."""
    root = ElementTree.Element(
        "testsuites", {"name": record.matrix, "time": f"{record.duration_s:.3f}"}
    )
    for cell in record.cells:
        root.append(
            suite_element(
                cell.name,
                _outcomes(cell, folder),
                started=cell.started or record.started,
                duration_s=cell.duration_s,
                properties={k: v for k, v in cell.values.items() if v} | {"where": cell.where},
            )
        )
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _outcomes(cell: CellRecord, folder: Path) -> tuple[Outcome, ...]:
    """Of the cell's run; one that stands for the cell where there is none."""
    if cell.folder and cell.counts:
        try:
            return load_record(folder / cell.folder / RUN_FOLDER / FILE_NAME).outcomes
        except InputError:
            pass
    return (Outcome((), cell.name, cell.verdict, cell.reason, duration_s=cell.duration_s),)
