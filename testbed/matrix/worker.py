# SPDX-License-Identifier: Apache-2.0
"""What a Dask worker does with a cell: runs it in a folder of its own, and sends back what it left.

The folder is in the worker's own, which Dask removes when the worker's successor starts; the run is
a process that ends with the worker.
"""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from testbed import __version__
from testbed.errors import HostError
from testbed.matrix.cells import Cell
from testbed.matrix.records import CellRecord
from testbed.matrix.run_cell import here, run_cell

TOPIC = "testbed"
# Of one cell's logs; the largest files stay behind first, and are named.
MOST_LOG_BYTES = 64 << 20
LEFT_BEHIND = "left-on-the-worker.txt"


@dataclass(frozen=True)
class Answer:
    """What comes back: the record, None if the cell was cancelled, and a tar of its logs."""

    record: CellRecord | None
    logs: bytes


def work(cell: Cell, files: Mapping[str, bytes], version: str) -> Answer:
    """Run ``cell`` on this worker.

    :param files: the suite's own file, by name; the worker has no other copy of it.
    :raises HostError: the worker has another version of the testbed.
    """
    from distributed import get_worker  # noqa: PLC0415  an optional extra

    if version != __version__:
        raise HostError(f"the worker has testbed {__version__}, the matrix is of {version}")
    worker = get_worker()
    where = f"{here()} {worker.address}"
    worker.log_event(TOPIC, {"cell": cell.name, "key": cell.key, "worker": worker.address})
    with tempfile.TemporaryDirectory(prefix="cell-", dir=worker.local_directory) as name:
        folder = Path(name)
        brought, attempt = folder / "files", folder / "attempt"
        for each in (brought, attempt):
            each.mkdir()
        for file, content in files.items():
            (brought / file).write_bytes(content)
        if cell.suite.path is not None:
            suite = replace(cell.suite, path=brought / cell.suite.path.name)
            cell = replace(cell, suite=suite)
        record = run_cell(cell, attempt, cancelled=_cancelled(), where=where)
        return Answer(record, pack(attempt))


def _cancelled() -> Callable[[], bool]:
    """Whether nobody wants this task's result any more: cancelled, or its client is gone."""
    from distributed import get_worker  # noqa: PLC0415
    from distributed.worker import thread_state  # noqa: PLC0415

    worker, key = get_worker(), thread_state.key

    def asked() -> bool:
        task = worker.state.tasks.get(key)
        return task is None or task.state == "cancelled" or worker.status.name != "running"

    return asked


def pack(folder: Path, most_bytes: int = MOST_LOG_BYTES) -> bytes:
    """All files below ``folder`` as a compressed tar, the largest left out if it is too much."""
    sizes = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
    left: list[str] = []
    while sum(sizes.values()) > most_bytes:
        largest = max(sizes, key=sizes.__getitem__)
        left.append(f"{largest.relative_to(folder)}: {sizes.pop(largest)} bytes\n")
    if left:
        note = folder / LEFT_BEHIND
        note.write_text("".join(left))
        sizes[note] = note.stat().st_size
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as tar:
        for path in sorted(sizes):
            tar.add(path, path.relative_to(folder), recursive=False)
    return buffer.getvalue()


def unpack(logs: bytes, folder: Path) -> None:
    """Below ``folder``, and nowhere else, whatever the names in it say.

    :raises OSError: it cannot be written. :raises tarfile.TarError: it is no such tar.
    """
    with tarfile.open(fileobj=io.BytesIO(logs), mode="r:gz") as tar:
        for member in tar:  # Debian 12's Python has no filters yet
            name = PurePosixPath(member.name)
            source = tar.extractfile(member) if member.isreg() else None
            if source is None or name.is_absolute() or ".." in name.parts:
                raise tarfile.TarError(f"{member.name!r} is no file below the folder")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                shutil.copyfileobj(source, file)
