# SPDX-License-Identifier: Apache-2.0
"""The store: one SQLite file in the state folder, shared by all runs of this user.

It is a convenience, never a reason for a run to fail: whatever is wrong with it is one line on
stderr. Runs that end at the same time wait for one another (WAL, a busy timeout). It is bounded:
the oldest runs go. A file that is no database any more is moved aside, under a lock so that two
runs do not both do it, and a new one is begun.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path

from testbed.errors import HostError, InputError
from testbed.history.model import Remembered, ResultLine, RunLine, result_lines, run_line
from testbed.host import paths
from testbed.results import record as records
from testbed.results.record import RunRecord

FILE_NAME = "history.sqlite3"
VERSION = 1
MOST_RUNS = 2000
MOST_RESULTS_A_RUN = 5000
BUSY_S = 15.0

_RUN_COLUMNS = tuple(each.name for each in fields(RunLine))
_RESULT_COLUMNS = tuple(each.name for each in fields(ResultLine))
_TYPES = {"exit_code": "INTEGER", "duration_s": "REAL", "tests": "INTEGER"}


def _columns(names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_TYPES.get(name, 'TEXT')} NOT NULL" for name in names)


_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS runs (number INTEGER PRIMARY KEY, {_columns(_RUN_COLUMNS)},
    UNIQUE (key));
CREATE TABLE IF NOT EXISTS results (run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE,
    {_columns(_RESULT_COLUMNS)});
CREATE INDEX IF NOT EXISTS results_by_name ON results (name, run);
CREATE INDEX IF NOT EXISTS results_by_run ON results (run);
"""


class Unusable(HostError):
    """The store cannot be used as it is, and is left as it is."""


def default_file() -> Path:
    """Where this user's store is."""
    return paths.state_dir() / FILE_NAME


def remember(
    run_dir: Path,
    say: Callable[[str], None],
    file: Path | None = None,
    *,
    record: RunRecord | None = None,
) -> None:
    """Keep what a run said; ``say`` is told if that cannot be done, and nothing is raised.

    :param run_dir: a folder with a record, or, as of several reports, folders that have one each.
    :param record: the one of the folder, if it is at hand.
    """
    own = run_dir / records.FILE_NAME
    with contextlib.suppress(OSError):
        found = [own] if own.is_file() else sorted(run_dir.glob(f"*/{records.FILE_NAME}"))
        for path in found:
            try:
                found_record = record if path == own and record else records.load_record(path)
                add(file or default_file(), found_record, path.parent, say)
            except (HostError, InputError, sqlite3.Error, OSError) as error:
                say(f"this run is not in the history: {error}")


def add(file: Path, record: RunRecord, folder: Path, say: Callable[[str], None]) -> None:
    """Add one run; one that is there already is not added again.

    :raises Unusable, sqlite3.Error, OSError: it cannot be kept.
    """
    line = run_line(record, str(folder.absolute()))
    results = list(result_lines(record))[:MOST_RESULTS_A_RUN]
    with opened(file, say) as store, store:
        store.execute("BEGIN IMMEDIATE")  # waits here for other runs, and not half-way
        known = store.execute("SELECT 1 FROM runs WHERE key = ?", (line.key,)).fetchone()
        if known:
            return
        number = store.execute(_insert("runs", _RUN_COLUMNS), _plain(astuple(line))).lastrowid
        store.executemany(
            _insert("results", ("run", *_RESULT_COLUMNS)),
            [(number, *_plain(astuple(each))) for each in results],
        )
        store.execute(
            "DELETE FROM runs WHERE number NOT IN"
            " (SELECT number FROM runs ORDER BY number DESC LIMIT ?)",
            (MOST_RUNS,),
        )


def read(
    file: Path,
    say: Callable[[str], None],
    *,
    name: str = "",
    kernel: str = "",
    topology: str = "",
    broken: bool = False,
    runs: int = MOST_RUNS,
) -> list[Remembered]:
    """What was said, oldest run first.

    :param name: of one requirement, test or report; all if "".
    :param kernel: only runs whose kernel's release has this in it; ``topology`` the rack's name.
    :param broken: also runs with a deliberate break.
    :param runs: of the newest so many runs that fit.
    :raises Unusable: it cannot be read.
    """
    if not file.exists():
        return []
    wanted = ["(? OR mutation IN ('', 'none'))", "instr(kernel, ?)", "(? = '' OR topology = ?)"]
    values = [int(broken), kernel, topology, topology]
    if name:
        wanted.append("number IN (SELECT run FROM results WHERE name = ?)")
        values.append(name)
    chosen = (
        f"SELECT * FROM runs WHERE {' AND '.join(wanted)}"  # noqa: S608  (our own words)
        " ORDER BY started DESC, number DESC LIMIT ?"
    )
    columns = [*(f"r.{each}" for each in _RUN_COLUMNS), *(f"s.{each}" for each in _RESULT_COLUMNS)]
    query = (
        f"SELECT {', '.join(columns)} FROM ({chosen}) r JOIN results s ON s.run = r.number"  # noqa: S608
        " WHERE ? = '' OR s.name = ? ORDER BY r.started, r.number, s.rowid"
    )
    try:
        with opened(file, say) as store:
            rows = store.execute(query, (*values, runs, name, name)).fetchall()
    except sqlite3.Error as error:
        raise Unusable(f"{file}: {error}") from error
    split = len(_RUN_COLUMNS)
    return [Remembered(RunLine(*row[:split]), ResultLine(*row[split:])) for row in rows]


@contextmanager
def opened(file: Path, say: Callable[[str], None]) -> Iterator[sqlite3.Connection]:
    """The store, made if it is missing, begun anew if it is corrupt; ``say`` is told of that.

    :raises Unusable: it is a newer version's.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        store = _open(file)
    except sqlite3.DatabaseError as error:
        if not _is_corrupt(error):
            raise
        _move_aside(file, say)
        store = _open(file)
    with contextlib.closing(store):
        yield store


def _open(file: Path) -> sqlite3.Connection:
    """:raises sqlite3.Error: among them that it is no database."""
    store = sqlite3.connect(file, timeout=BUSY_S)
    try:
        version = int(store.execute("PRAGMA user_version").fetchone()[0])
        if version > VERSION:
            raise Unusable(f"{file} is a newer testbed's (version {version}, not {VERSION})")
        store.execute("PRAGMA journal_mode = WAL")
        store.execute("PRAGMA synchronous = NORMAL")
        store.execute("PRAGMA foreign_keys = ON")
        if version < VERSION:
            store.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        faults = store.execute("PRAGMA quick_check(1)").fetchone()[0]
        if faults != "ok":
            raise sqlite3.DatabaseError(f"malformed: {faults}")
    except BaseException:
        store.close()
        raise
    return store


def _is_corrupt(error: sqlite3.DatabaseError) -> bool:
    """The file, not the moment: neither a lock nor a full disk."""
    if isinstance(error, sqlite3.OperationalError):
        return "no such table" in str(error) or "no such column" in str(error)
    words = ("malformed", "not a database", "corrupt", "unsupported file format")
    return any(word in str(error) for word in words)


def _move_aside(file: Path, say: Callable[[str], None]) -> None:
    with _alone(file):
        try:
            _open(file).close()
            return  # another run has put it right in the meantime
        except sqlite3.DatabaseError as error:
            if not _is_corrupt(error):
                raise
        aside = file.with_name(f"{file.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        # The database last: whoever opens it meanwhile finds it corrupt, and waits for this lock.
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                file.with_name(file.name + suffix).rename(aside.with_name(aside.name + suffix))
        say(f"the history {file} was corrupt: it is moved to {aside.name}, and begins anew")


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    with file.with_name(file.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _insert(table: str, columns: Iterable[str]) -> str:
    names = list(columns)
    marks = ", ".join("?" for _ in names)
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})"  # noqa: S608  (ours)


def _plain(values: Iterable[object]) -> tuple[object, ...]:
    """Text that UTF-8 has no form for (a lone surrogate from a guest) is replaced."""
    return tuple(
        str(value).encode(errors="replace").decode() if isinstance(value, str) else value
        for value in values
    )
