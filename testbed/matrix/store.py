# SPDX-License-Identifier: Apache-2.0
"""The folder of a matrix run: what is finished, atomically; one harness at a time.

``matrix.yaml``            the file as it was
``cells/NAME/cell.json``   a finished cell; ``cells/NAME/N/`` its N-th attempt's logs and record
``matrix.json``, ``junit.xml``, ``index.html``   the whole, made again at each end
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from testbed.errors import Diagnostic, HostError, InputError
from testbed.host import paths
from testbed.matrix.cells import Cell
from testbed.matrix.records import CELL_FILE, CellRecord, load_cell, write_cell
from testbed.results.record import FILE_NAME, write_atomically
from testbed.topology.problem import nearest

CELLS = "cells"
COPY = "matrix.yaml"
RUN_FOLDER = "run"  # of a cell's attempt
LOCK = "lock"
LAST = "last"
RUNS = "matrices"
_NAME = re.compile(r"""^[{\s]*["']?matrix["']?\s*:\s*["']?([\w-]+)""", re.MULTILINE)


class Store:
    """One run's folder.

    :param note: is told the folder of each run that has left a record, before its cell counts as
        finished: what is killed between runs again, and no finished run is forgotten.
    """

    def __init__(self, folder: Path, note: Callable[[Path], None] = lambda _: None) -> None:
        self.folder = folder
        self._note = note

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this harness works in it. :raises InputError: another one does."""
        self._make(self.folder / CELLS)
        with (self.folder / LOCK).open("w") as file:
            os.set_inheritable(file.fileno(), False)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another testbed works on {self.folder}", hint="wait until it has ended"
                ) from None
            yield

    def keep_file(self, content: bytes) -> None:
        """The matrix file as it was read. :raises HostError: it cannot be kept."""
        self.write(COPY, content)

    def write(self, name: str, content: bytes) -> None:
        """A file of the run's, whole or not at all. :raises HostError: it cannot be written."""
        try:
            write_atomically(self.folder / name, content)
        except OSError as error:
            raise HostError(f"cannot write {self.folder / name}: {error.strerror}") from error

    def finished(self, cells: Sequence[Cell]) -> dict[str, CellRecord]:
        """By cell name, what has ended before; by key, so a changed file's new cells have not."""
        found: dict[str, CellRecord] = {}
        by_key = {}
        for path in sorted((self.folder / CELLS).glob(f"*/{CELL_FILE}")):
            try:
                record = load_cell(path)
            except InputError:
                continue  # written by another version, or damaged: it runs again
            by_key[record.key] = record
        for cell in cells:
            if cell.key in by_key:
                found[cell.name] = replace(by_key[cell.key], name=cell.name)
        return found

    def attempt(self, cell: Cell) -> Path:
        """A fresh folder for the next attempt."""
        folder = self.folder / CELLS / cell.name
        self._make(folder)
        number = 1 + max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)
        attempt = folder / str(number)
        self._make(attempt)
        return attempt

    def keep(self, record: CellRecord, attempt: Path | None) -> CellRecord:
        """Note that a cell is finished; durable when this returns. :raises HostError: it cannot."""
        folder = self.folder / CELLS / record.name
        if attempt is not None and any(attempt.iterdir()):
            record = replace(record, folder=str(attempt.relative_to(self.folder)))
            if (attempt / RUN_FOLDER / FILE_NAME).is_file():
                self._note(attempt / RUN_FOLDER)
        try:
            self._make(folder)
            write_cell(record, folder)
        except OSError as error:
            raise HostError(f"cannot write {folder / CELL_FILE}: {error.strerror}") from error
        return record

    @staticmethod
    def _make(folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostError(f"cannot make {folder}: {error.strerror}") from error


def runs_dir() -> Path:
    """Where matrix runs are kept if no folder is given."""
    return paths.state_dir() / RUNS


def new_run(name: str) -> Path:
    """A fresh folder's path in the state folder, not made yet."""
    return runs_dir() / f"{name}-{secrets.token_hex(2)}"


def find_run(word: str, matrix: str) -> Path:
    """A run's folder: a path, the name of one in the state folder, or `last`, the newest of this
    matrix.

    :raises InputError: there is none.
    """
    if Path(word).is_dir():
        return Path(word).resolve()
    known = sorted(p.name for p in runs_dir().glob("*") if (p / CELLS).is_dir())
    if word == LAST:
        for name in reversed(known):
            if _matrix_of(runs_dir() / name) == matrix:
                return runs_dir() / name
        raise InputError(
            f"no run of the matrix '{matrix}' in {runs_dir()}", hint="--resume FOLDER, or without"
        )
    if word in known:
        return runs_dir() / word
    expected = f"a folder, {LAST}, or a run in {runs_dir()}"
    raise InputError(
        diagnostics=[Diagnostic(word, 0, 0, "no such run", expected, nearest(word, [*known, LAST]))]
    )


def _matrix_of(folder: Path) -> str:
    """The matrix whose run it is, as the first key of its file says; "" if it has none yet."""
    try:
        text = (folder / COPY).read_text(errors="replace")
    except OSError:
        return ""
    found = _NAME.search(text)
    return found[1] if found else ""
