# SPDX-License-Identifier: Apache-2.0
"""From a plan to one record: what has ended before is kept, the rest runs, here or on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from testbed.errors import Interrupted
from testbed.host.facts import host_facts
from testbed.matrix import junit, page
from testbed.matrix.cells import Cell
from testbed.matrix.cluster import ClusterLost, ClusterRun
from testbed.matrix.connection import open_cluster
from testbed.matrix.display import Display, shown
from testbed.matrix.load import Plan
from testbed.matrix.needs import Room
from testbed.matrix.pool import Pool
from testbed.matrix.records import MATRIX_FILE, CellRecord, MatrixRecord, exit_code, to_json
from testbed.matrix.run_cell import run_cell, skipped
from testbed.matrix.store import Store
from testbed.results.verdicts import Verdict

RUN_AGAIN = (Verdict.FAIL, Verdict.LOST, Verdict.ERROR)
JUNIT_FILE = "junit.xml"


@dataclass(frozen=True)
class How:
    """Where and how a matrix runs.

    ``cluster``      a word of ``--cluster``, or "" for this machine.
    ``only_failed``  of a resumed run: what ended FAIL, LOST or ERROR runs again too.
    """

    room: Room
    cluster: str = ""
    only_failed: bool = False
    worker_wait_s: float = 60.0
    command: Sequence[str] = ()


def drive(plan: Plan, store: Store, how: How) -> MatrixRecord:
    """Run what has not ended, and write everything. An interruption is in the record's exit code.

    :raises InputError: another testbed works in the folder.
    """
    started, began_s = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    note, interrupted = "", False
    with store.locked():
        store.keep_file(plan.content)
        ended = {c.name: skipped(c, c.skip) for c in plan.cells if c.skip}
        before = store.finished([c for c in plan.cells if not c.skip])
        ended |= {
            name: record
            for name, record in before.items()
            if not (how.only_failed and record.verdict in RUN_AGAIN)
        }
        left = [cell for cell in plan.cells if cell.name not in ended]
        with shown(len(plan.cells), len(ended)) as display:
            if before:
                display.say(f"{len(before)} cells had ended; {len(left)} are to run")
            try:
                for record in _records(left, store, how, display):
                    ended[record.name] = record
                    display.ended(record.name, record.verdict, record.reason, record.duration_s)
            except ClusterLost as error:
                note = error.message
                display.say(note)
            except (KeyboardInterrupt, Interrupted):
                note, interrupted = "interrupted", True
        cells = tuple(ended[cell.name] for cell in plan.cells if cell.name in ended)
        absent = len(plan.cells) - len(cells)
        written = MatrixRecord(
            matrix=plan.matrix.matrix,
            file=plan.file,
            description=plan.matrix.description,
            axes=_axes(plan),
            cells=cells,
            started=started,
            duration_s=round(time.monotonic() - began_s, 3),
            exit_code=int(exit_code(cells, missing=absent, interrupted=interrupted)),
            missing=absent,
            note=note,
            host=host_facts(),
            command=tuple(how.command),
        )
        store.write(MATRIX_FILE, to_json(written))
        store.write(JUNIT_FILE, junit.to_junit(written, store.folder))
        store.write(page.PAGE_FILE, page.to_html(written, store.folder).encode(errors="replace"))
    return written


def _records(
    cells: Sequence[Cell], store: Store, how: How, display: Display
) -> Iterator[CellRecord]:
    if not cells:
        return
    if how.cluster:
        with open_cluster(how.cluster, how.room, store.folder) as connect:
            run = ClusterRun(connect, store, display, worker_wait_s=how.worker_wait_s)
            yield from run.records(cells)
        return
    display.say(how.room.words([cell.need for cell in cells]))

    def work(cell: Cell, cancelled: Callable[[], bool]) -> CellRecord | None:
        if why_not := how.room.too_large(cell.need):
            return store.keep(skipped(cell, why_not), None)
        attempt = store.attempt(cell)
        record = run_cell(cell, attempt, cancelled=cancelled)
        return None if record is None else store.keep(record, attempt)

    pool = Pool(how.room, lambda c: c.need, work, on_start=lambda c: display.started(c.name))
    for _, record in pool.results(cells):
        if record is not None:
            yield record


def _axes(plan: Plan) -> tuple[str, ...]:
    """Those that tell cells apart."""
    from testbed.matrix.model import AXES  # noqa: PLC0415

    return tuple(a for a in AXES if len({cell.values[a] for cell in plan.cells}) > 1)
