# SPDX-License-Identifier: Apache-2.0
"""How a cell and a matrix ended: versioned JSON files, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from testbed import __version__
from testbed.errors import Diagnostic, ExitCode, InputError
from testbed.results.record import write_atomically
from testbed.results.verdicts import Verdict, code_of, combine

CELL_FILE = "cell.json"
MATRIX_FILE = "matrix.json"
CELL_SCHEMA = "testbed.cell/1"
MATRIX_SCHEMA = "testbed.matrix/1"

T = TypeVar("T")


@dataclass(frozen=True)
class CellRecord:
    """One finished cell.

    ``key``           of all that decides its result (:mod:`testbed.matrix.cells`).
    ``counts``        tests by verdict.
    ``requirements``  each requirement's verdict.
    ``where``         the machine, and the worker if it was one's.
    ``attempts``      how often it was started; more than once where a worker died.
    ``folder``        its logs and its run's record, in the matrix's folder; "" if it never ran.
    ``command``       what runs it again, below that folder.
    """

    name: str
    key: str
    values: Mapping[str, str]
    verdict: Verdict
    reason: str = ""
    counts: Mapping[Verdict, int] = field(default_factory=dict)
    requirements: Mapping[str, Verdict] = field(default_factory=dict)
    duration_s: float = 0.0
    started: str = ""
    where: str = ""
    attempts: int = 0
    folder: str = ""
    command: tuple[str, ...] = ()
    schema: str = CELL_SCHEMA
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class MatrixRecord:
    """One matrix: all cells that have an end, in the file's order.

    ``missing``  how many have none, because the run was interrupted or lost its cluster.
    """

    matrix: str
    file: str
    description: str
    axes: tuple[str, ...]
    cells: tuple[CellRecord, ...]
    started: str
    duration_s: float
    exit_code: int
    missing: int = 0
    note: str = ""
    host: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    tool_version: str = __version__
    schema: str = MATRIX_SCHEMA
    __pydantic_config__ = ConfigDict(extra="forbid")


def exit_code(cells: Iterable[CellRecord], *, missing: int, interrupted: bool) -> ExitCode:
    """What the process answers: the worst cell; what has no end is never a PASS."""
    verdicts = [cell.verdict for cell in cells]
    if interrupted:
        return ExitCode.INTERRUPTED
    if missing:
        return ExitCode.FAIL if Verdict.FAIL in verdicts else ExitCode.ERROR
    return code_of(combine(verdicts)) if verdicts else ExitCode.BAD_INPUT


def write_cell(record: CellRecord, folder: Path) -> None:
    """Into ``folder``; OSError."""
    write_atomically(folder / CELL_FILE, _cells().dump_json(record, indent=1) + b"\n")


def to_json(record: MatrixRecord) -> bytes:
    """The JSON document."""
    return _matrices().dump_json(record, indent=1) + b"\n"


def load_cell(path: Path) -> CellRecord:
    """Read one back. :raises InputError: it cannot be read, or is no such record."""
    return _load(path, _cells(), CELL_SCHEMA)


def load_matrix(path: Path) -> MatrixRecord:
    """Read one back. :raises InputError: it cannot be read, or is no such record."""
    return _load(path, _matrices(), MATRIX_SCHEMA)


def _load(path: Path, adapter: TypeAdapter[T], schema: str) -> T:
    def refuse(message: str) -> InputError:
        return InputError(diagnostics=[Diagnostic(str(path), 0, 0, message)])

    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise refuse(f"is no JSON: {error}") from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != schema:
        raise refuse(f"is not a record of this version: schema {found!r}, expected {schema!r}")
    try:
        return adapter.validate_json(json.dumps(data))
    except ValidationError as error:
        raise refuse(f"is not of the format: {error.errors()[0]['msg']}") from None


@cache
def _cells() -> TypeAdapter[CellRecord]:
    return TypeAdapter(CellRecord)


@cache
def _matrices() -> TypeAdapter[MatrixRecord]:
    return TypeAdapter(MatrixRecord)
