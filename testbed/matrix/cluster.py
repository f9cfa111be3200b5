# SPDX-License-Identifier: Apache-2.0
"""Cells on a Dask cluster: submitted as workers become free, done again where a worker died.

What can go wrong, and what is done about it:

* A worker dies: Dask gives its cell to another; after :data:`MOST_DEATHS` of them the cell is an
  ERROR. No more cells are submitted than there are workers, so no cell is blamed that only waited.
* The scheduler goes: whatever had ended is on this disk; we connect again for a while, and submit
  what is left. If it does not come back, that is said, and ``--resume`` goes on from there.
* A worker hangs: a cell that is long past its own deadline is given up, as an ERROR.
* No worker has what a cell needs: SKIP, naming it.
"""

from __future__ import annotations

import contextlib
import queue
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from testbed import __version__
from testbed.errors import HostError
from testbed.matrix.cells import Cell
from testbed.matrix.connection import CALL_S, CONNECT_S, MOST_DEATHS, Connect
from testbed.matrix.display import Display
from testbed.matrix.needs import Worker, missing, needed
from testbed.matrix.records import CellRecord
from testbed.matrix.run_cell import skipped
from testbed.matrix.store import Store
from testbed.matrix.worker import TOPIC, Answer, unpack, work
from testbed.results.verdicts import Verdict

if TYPE_CHECKING:
    from distributed import Future

WORKER_WAIT_S = 60.0
# Beyond a cell's own deadline: the set-up of a new machine, and the way of its logs.
GRACE_S = 900.0
_TICK_S = 0.5
_LOOK_S = 2.0


class ClusterLost(HostError):
    """The cluster is gone, with cells not run; what had ended is kept."""


@dataclass
class _Flying:
    """A cell that was submitted."""

    cell: Cell
    future: Future[Answer]
    submitted_s: float
    starts: int = 0
    worker: str = ""
    started_s: float | None = None


@dataclass
class ClusterRun:
    """The cells of one matrix on one cluster."""

    connect: Connect
    store: Store
    display: Display
    worker_wait_s: float = WORKER_WAIT_S
    _client: Any = None
    _workers: list[Worker] = field(default_factory=list)
    _flying: dict[str, _Flying] = field(default_factory=dict)
    _ended: queue.SimpleQueue[tuple[str, Any]] = field(default_factory=queue.SimpleQueue)
    _starts: dict[str, int] = field(default_factory=dict)
    _looked_s: float = 0.0
    _seen_worker_s: float = 0.0
    _scheduler: str = ""
    _is_new: bool = False

    def records(self, cells: Sequence[Cell]) -> Iterator[CellRecord]:
        """Each cell's record, kept, as they end.

        :raises ClusterLost: it is gone, and did not come back.
        """
        waiting = list(reversed(cells))
        aside: list[Cell] = []  # no worker has room for them, so far
        try:
            self._open()
            while waiting or self._flying or aside:
                self._look()
                waiting += [c for c in reversed(aside) if not missing(c.need, self._workers)]
                aside = [c for c in aside if missing(c.need, self._workers)]
                while waiting and len(self._flying) < sum(w.threads for w in self._workers):
                    cell = waiting.pop()
                    if self._workers and missing(cell.need, self._workers):
                        aside.append(cell)
                    else:
                        self._submit(cell)
                if not waiting and not self._flying:
                    for cell in aside:
                        record = skipped(cell, missing(cell.need, self._workers))
                        yield self.store.keep(record, None)
                    return
                if self._lost():
                    waiting += [flying.cell for flying in reversed(self._flying.values())]
                    self._reopen()
                    continue
                yield from self._results(waiting)
        finally:
            self._close()

    # Connection

    def _open(self, wait_s: float = CONNECT_S) -> None:
        try:
            self._client = self.connect(wait_s)
            self._client.subscribe_topic(TOPIC, self._event)
        except (OSError, TimeoutError, ValueError) as error:
            said = str(error) or type(error).__name__
            raise ClusterLost(f"no Dask scheduler answers: {said}") from None
        self._seen_worker_s = time.monotonic()
        self._looked_s = 0.0
        self._scheduler, self._is_new, self._workers = "", False, []

    def _close(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        with contextlib.suppress(Exception):
            client.cancel([flying.future for flying in self._flying.values()], force=True)
        with contextlib.suppress(Exception):
            client.close(timeout=CALL_S)
        self._flying.clear()

    def _lost(self) -> bool:
        return self._is_new or self._client is None or self._client.status != "running"

    def _reopen(self) -> None:
        self.display.say("the scheduler is gone; trying to reach it again")
        self._flying.clear()
        self._close()
        deadline_s = time.monotonic() + self.worker_wait_s
        while True:
            try:
                self._open(min(CONNECT_S, self.worker_wait_s))
            except ClusterLost as error:
                if time.monotonic() > deadline_s:
                    message = f"the scheduler went away and did not come back: {error.message}"
                    raise ClusterLost(message) from None
                time.sleep(_LOOK_S)
                continue
            self.display.say("the scheduler is back; what had not ended starts again")
            return

    def _look(self) -> None:
        """Who works here, every two seconds; ClusterLost if nobody does for too long."""
        now_s = time.monotonic()
        if now_s - self._looked_s < (_LOOK_S if self._workers else _TICK_S):
            return
        self._looked_s = now_s
        try:
            info = self._client.sync(
                self._client.scheduler.identity, n_workers=-1, callback_timeout=CALL_S
            )
        except Exception as error:  # whatever a broken connection raises; asked again soon
            if not self._lost() and now_s - self._seen_worker_s > self.worker_wait_s:
                raise ClusterLost(f"the scheduler does not answer: {error!r}") from None
            return
        if self._scheduler != info["id"]:
            # The client came back by itself, to a scheduler that knows nothing of us.
            self._is_new = bool(self._scheduler)
            self._scheduler = info["id"]
        self._workers = [
            Worker(address, int(w["nthreads"]), w.get("resources", {}))
            for address, w in info["workers"].items()
            if w.get("status", "running") == "running"
        ]
        if self._workers:
            self._seen_worker_s = now_s
        elif now_s - self._seen_worker_s > self.worker_wait_s:
            raise ClusterLost(f"the cluster has had no worker for {self.worker_wait_s:.0f} s")

    def _event(self, event: tuple[float, dict[str, str]]) -> None:
        """A worker has begun with a cell."""
        _, what = event
        name = what.get("cell", "")
        self._starts[name] = self._starts.get(name, 0) + 1
        flying = self._flying.get(name)
        if flying is None or flying.cell.key != what.get("key"):
            return
        if flying.starts:
            self.display.say(f"{name}: {flying.worker} died; begun again on {what['worker']}")
        flying.starts += 1
        flying.worker, flying.started_s = what["worker"], time.monotonic()
        self.display.started(name)

    # Cells

    def _submit(self, cell: Cell) -> None:
        known: dict[str, float] = {}
        for worker in self._workers:
            known |= worker.resources
        path = cell.suite.path
        files = {path.name: path.read_bytes()} if path is not None else {}
        future = self._client.submit(
            work,
            cell,
            files,
            __version__,
            key=f"testbed-{cell.key}-{time.time_ns():x}",
            resources=needed(cell.need, known) or None,
            pure=False,
            retries=0,
        )
        self._flying[cell.name] = _Flying(cell, future, time.monotonic())
        future.add_done_callback(lambda done: self._ended.put((cell.name, done)))

    def _results(self, waiting: list[Cell]) -> Iterator[CellRecord]:
        """What has ended by now, after a moment's wait; what was nobody's fault waits again."""
        wait_s = _TICK_S
        while True:
            try:
                name, future = self._ended.get(timeout=wait_s)
            except queue.Empty:
                break
            wait_s = 0.0
            flying = self._flying.get(name)
            if flying is None or flying.future is not future:
                continue
            del self._flying[name]
            is_gone = future.status in ("cancelled", "lost")  # with its scheduler
            record = None if is_gone else self._record(flying)
            if record is None:
                waiting.append(flying.cell)
            else:
                yield record
        now_s = time.monotonic()
        for name, flying in list(self._flying.items()):
            since_s = flying.started_s or flying.submitted_s
            if now_s - since_s > flying.cell.deadline_s + GRACE_S:
                del self._flying[name]
                with contextlib.suppress(Exception):
                    self._client.cancel([flying.future], force=True)
                where = f"worker {flying.worker}" if flying.worker else "the cluster"
                yield self._error(flying, f"no answer from {where} in {now_s - since_s:.0f} s")

    def _record(self, flying: _Flying) -> CellRecord | None:
        """The record of a cell that came back; None if it has to run again."""
        from distributed import KilledWorker  # noqa: PLC0415

        cell = flying.cell
        try:
            answer: Answer = flying.future.result(timeout=CALL_S)
        except KilledWorker as error:
            if self._starts.get(cell.name, 0) < MOST_DEATHS:
                return None  # it was only near
            last = getattr(error, "last_worker", None)
            address = getattr(last, "address", flying.worker) or "unknown"
            deaths = self._starts[cell.name]
            return self._error(flying, f"{deaths} workers died while they ran it, last {address}")
        except TimeoutError:
            return None
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            return self._error(flying, f"the worker could not run it: {said}")
        if answer.record is None:
            return None
        attempt = self.store.attempt(cell)
        try:
            unpack(answer.logs, attempt)
        except (OSError, tarfile.TarError) as error:
            self.display.say(f"{cell.name}: its logs are not kept: {error}")
        attempts = max(1, self._starts.get(cell.name, 0))
        return self.store.keep(replace(answer.record, attempts=attempts), attempt)

    def _error(self, flying: _Flying, reason: str) -> CellRecord:
        cell = flying.cell
        attempts = self._starts.get(cell.name, 0)
        record = CellRecord(
            cell.name, cell.key, cell.values, Verdict.ERROR, reason, attempts=attempts
        )
        return self.store.keep(record, None)
