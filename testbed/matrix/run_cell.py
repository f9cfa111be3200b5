# SPDX-License-Identifier: Apache-2.0
"""One cell, on this machine: a run of its own in a process of its own, and its record."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from testbed.errors import ExitCode, InputError
from testbed.matrix import child
from testbed.matrix.cells import Cell
from testbed.matrix.page import write_cell_page
from testbed.matrix.records import CellRecord
from testbed.matrix.store import RUN_FOLDER
from testbed.results.ktap import one_line
from testbed.results.record import FILE_NAME, RunRecord, load_record
from testbed.results.verdicts import Verdict, combine, count

RACK_FILE = "rack.json"
EMPTY_REASON = "the suite is empty: nothing was started, nothing tested"


def here() -> str:
    """This machine and process, for records."""
    return f"{platform.node()}:{os.getpid()}"


def skipped(cell: Cell, reason: str) -> CellRecord:
    """A cell that cannot run."""
    return CellRecord(cell.name, cell.key, cell.values, Verdict.SKIP, reason)


def words(cell: Cell, folder: Path) -> list[str]:
    """What stands behind `testbed run` for this cell."""
    made = [cell.suite.argument, "-t", str(folder / RACK_FILE), "--output"]
    made += [str(folder / RUN_FOLDER), "--format", "json"]
    made += ["-k", cell.keyword] if cell.keyword else []
    made += ["--qemu", cell.qemu] if cell.qemu else []
    made += ["--warm"] if cell.warm else []
    # Whoever gave us the matrix was asked before anything of theirs was read.
    made += ["--trust"] if '"device"' in json.dumps(cell.topology) else []
    return made


def run_cell(
    cell: Cell,
    folder: Path,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    attempts: int = 1,
    where: str = "",
) -> CellRecord | None:
    """Run it, with everything that is kept in ``folder``, which exists and is empty.

    :returns: None if it was cancelled.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    if cell.skip or (why_not := _why_not(cell)):
        return skipped(cell, cell.skip or why_not)

    def ended(verdict: Verdict, reason: str, end_s: float, run: RunRecord | None) -> CellRecord:
        counts = count(run.outcomes) if run else {}
        return CellRecord(
            cell.name,
            cell.key,
            cell.values,
            verdict,
            one_line(reason),
            counts={v: number for v, number in counts.items() if number},
            requirements={r.requirement: r.verdict for r in run.requirements} if run else {},
            duration_s=round(end_s, 3),
            started=started,
            where=where or here(),
            attempts=attempts,
            command=("testbed", "run", *command),
        )

    command: list[str] = []
    if cell.is_empty:
        return ended(Verdict.SKIP, EMPTY_REASON, 0.0, None)
    command = words(cell, folder)
    try:
        (folder / RACK_FILE).write_text(json.dumps(cell.topology, indent=1) + "\n")
        end = child.run(command, folder, deadline_s=cell.deadline_s, cancelled=cancelled)
    except OSError as error:
        return ended(Verdict.ERROR, f"could not be started: {error}", 0.0, None)
    if end.why == "cancelled":
        return None
    if end.why == "deadline":
        reason = f"it did not end within {cell.deadline_s} s, and was ended"
        return ended(Verdict.ERROR, reason, end.duration_s, None)
    verdict, reason, run = judged(end, folder / RUN_FOLDER)
    if run is not None:
        write_cell_page(folder / RUN_FOLDER)  # without one, its place leads to what it left
    return ended(verdict, reason, end.duration_s, run)


def _why_not(cell: Cell) -> str:
    """What this machine lacks, that can be told without starting anything."""
    if cell.is_empty:
        return ""
    if cell.qemu and not os.access(cell.qemu, os.X_OK):
        return f"there is no QEMU at {cell.qemu}"
    for node in cell.topology["nodes"].values():
        kernel = str(node["kernel"]).partition("::")[0]
        if kernel.startswith("/") and not Path(kernel).exists():
            return f"there is no kernel at {kernel}"
    if cell.need.kvm and not has_kvm():
        return "KVM does not work here"
    return ""


def has_kvm() -> bool:
    """May /dev/kvm be opened? The run itself probes whether a guest starts under it."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def judged(end: child.ChildEnd, run_dir: Path) -> tuple[Verdict, str, RunRecord | None]:
    """The verdict of a run that has ended by itself: its record's, or what kept it from having one.

    :returns: with one line that says why, "" for a PASS; and the record.
    """
    path = run_dir / FILE_NAME
    try:
        run = load_record(path) if path.exists() else None
    except InputError as error:
        # Most likely our own files have changed since this process began.
        said = one_line(str(error))
        return Verdict.ERROR, f"the run ended with {end.status}, and left {said}", None
    if run is not None and run.exit_code == ExitCode.INTERRUPTED:
        return Verdict.ERROR, "the run was interrupted by someone else", run
    if run is not None and run.outcomes and end.status == run.exit_code:
        verdict = combine(outcome.verdict for outcome in run.outcomes)
        if verdict is Verdict.PASS:
            return verdict, "", run
        first = next(o for o in run.outcomes if o.verdict is verdict)
        return verdict, f"{first.title}: {first.reason}", run
    said = end.last_words or "it said nothing"
    if end.status in (ExitCode.SKIP, ExitCode.BAD_INPUT):
        return Verdict.SKIP, said, None
    return Verdict.ERROR, f"the run {_ending(end.status, run)}: {said}", None


def _ending(status: int, run: RunRecord | None) -> str:
    if status < 0:
        return f"died of signal {-status}"
    if run is None:
        return f"ended with {status} and no record"
    if not run.outcomes:
        return f"ended with {status} and a record without any test"
    return f"ended with {status}, though its record says {run.exit_code}"
