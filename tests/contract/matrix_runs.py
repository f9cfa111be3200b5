# SPDX-License-Identifier: Apache-2.0
"""Matrices of cells that boot nothing: what they share, and how they are run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from testbed.history import store

# A child is a Python that imports pytest; busy hosts take five times as long.
DEADLINE_S = 100

QUICK = "def test_quick():\n    pass\n"
WRONG = "def test_wrong():\n    assert 1 == 2, 'one is not two'\n"
# Each cell says that it runs, and waits until it may end.
GATED = """\
import os, pathlib, time
HERE = pathlib.Path({folder!r})
def test_gated():
    (HERE / f"runs-{{os.getpid()}}").touch()
    deadline = time.monotonic() + {deadline_s}
    while not (HERE / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
"""
# Takes the process with it that runs the cell: once, or always.
KILLER = """\
import os, pathlib, signal, time
MARK = pathlib.Path({mark!r})
def test_killer():
    if {always} or not MARK.exists():
        MARK.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
"""


def write(folder: Path, text: str, **files: str) -> Path:
    """A matrix file, with tests (``name`` becomes ``test_name.py``) beside it."""
    for name, content in files.items():
        (folder / f"test_{name}.py").write_text(content)
    path = folder / "m.matrix.yaml"
    path.write_text(text)
    return path


def command(*words: str | Path) -> list[str]:
    """`testbed matrix WORDS`."""
    return [sys.executable, "-m", "testbed.cli", "matrix", *map(str, words)]


def start(folder: Path, *words: str | Path) -> subprocess.Popen[str]:
    """It, with its state in ``folder``."""
    return subprocess.Popen(
        command(*words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TESTBED_STATE_DIR": str(folder / "state")},
    )


@contextlib.contextmanager
def running(folder: Path, *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """It runs, and is gone at the end."""
    process = start(folder, *words)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def run(folder: Path, *words: str | Path) -> tuple[int, str, str]:
    """Its exit code, and what it printed."""
    with running(folder, *words) as process:
        out, err = process.communicate(timeout=DEADLINE_S)
        return process.returncode, out, err


def verdicts(folder: Path) -> dict[str, str]:
    """By cell, of a run's folder."""
    return {cell["name"]: cell["verdict"] for cell in record(folder)["cells"]}


def record(folder: Path) -> dict[str, Any]:
    """What a run wrote."""
    data: dict[str, Any] = json.loads((folder / "matrix.json").read_text())
    return data


def remembered(folder: Path) -> set[Path]:
    """The run folders that the history in ``folder`` has."""
    found = store.read(folder / "state" / store.FILE_NAME, print)
    return {Path(each.run.folder) for each in found}


def await_that(what: str, holds: Any, deadline_s: float = DEADLINE_S) -> None:
    """Until it holds."""
    limit_s = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < limit_s, f"not in time: {what}"
        time.sleep(0.05)


def runners(folder: Path) -> list[int]:
    """The processes with this folder in their command line, beside the matrix's own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"run" in words and any(str(folder).encode() in word for word in words):
                found.append(int(path.parent.name))
    return found


def gated(folder: Path) -> str:
    """A test that runs until the file ``go`` is there."""
    return GATED.format(folder=str(folder), deadline_s=DEADLINE_S)


def killer(mark: Path, *, always: bool) -> str:
    """A test that kills the process that runs its cell."""
    return KILLER.format(mark=str(mark), always=always)


def waiting(folder: Path) -> int:
    """How many gated tests run, or have."""
    return len(list(folder.glob("runs-*")))


def pids(process: subprocess.Popen[Any]) -> Sequence[int]:
    """Its children and theirs."""
    found: list[int] = []
    todo = [process.pid]
    while todo:
        pid = todo.pop()
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = [int(word) for word in path.read_text().split()]
                found += children
                todo += children
    return found


def alive(pid: int) -> bool:
    """There is such a process, and it has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
