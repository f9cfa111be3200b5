# SPDX-License-Identifier: Apache-2.0
"""The cluster that a word of ``--cluster`` means: a scheduler somewhere, or workers of our own."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import CapabilityMissing, InputError
from testbed.matrix.needs import KVM, MEMORY, Room
from testbed.matrix.run_cell import has_kvm

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local"
LOG = "cluster.log"
WORKERS_FOLDER = "workers"
EXTRA_HINT = f"{sys.executable} -m pip install 'testbed[cluster]'"
MOST_DEATHS = 3  # of workers, until their cell is to blame
CONNECT_S = 20.0
CALL_S = 15.0

Connect = Callable[[float], "Client"]


def parse(word: str) -> str | int:
    """A scheduler's address, or how many local workers; 0: as many as there is room for.

    :raises InputError: neither.
    """
    if word == LOCAL:
        return 0
    if word.startswith(f"{LOCAL}:"):
        number = word.removeprefix(f"{LOCAL}:")
        if number.isdecimal() and 0 < int(number) <= 1024:
            return int(number)
        raise InputError(f"--cluster {word}: '{number}' is no number of workers (1 to 1024)")
    scheme, separator, rest = word.partition("://")
    if not separator or not rest or scheme not in ("tcp", "tls", "ws", "wss", "ucx"):
        raise InputError(
            f"--cluster {word}: no cluster",
            hint=f"tcp://HOST:PORT (or tls://) of a Dask scheduler, {LOCAL}, or {LOCAL}:N",
        )
    return word


def need_dask() -> None:
    """:raises CapabilityMissing: it is not installed."""
    missing = [name for name in ("dask", "distributed") if not importlib.util.find_spec(name)]
    if missing:
        raise CapabilityMissing(
            f"--cluster needs Dask: no package {' and '.join(missing)}", hint=EXTRA_HINT
        )


@contextlib.contextmanager
def open_cluster(word: str, room: Room, folder: Path) -> Iterator[Connect]:
    """A function that connects within so many seconds: to the scheduler at ``word``, or to one of
    our own.

    :raises CapabilityMissing: Dask is not installed. :raises InputError: no such cluster.
    """
    where = parse(word)
    need_dask()
    import dask  # noqa: PLC0415  an optional extra
    import distributed  # noqa: PLC0415

    _log_to(folder / LOG)
    if isinstance(where, str):
        yield lambda wait_s: distributed.Client(where, timeout=wait_s, set_as_default=False)
        return
    number = where or room.slots
    scratch = folder / WORKERS_FOLDER
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    resources = {MEMORY: float(room.memory_bytes // number)}
    if has_kvm():
        resources[KVM] = 1.0
    settings = {
        "distributed.scheduler.allowed-failures": MOST_DEATHS - 1,
        "distributed.comm.timeouts.connect": f"{CONNECT_S:g}s",
        # No web pages: they would show anybody on this machine what runs.
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
    }
    with dask.config.set(settings):
        # Only those who have this cluster's own certificate may give it work.
        security = distributed.Security.temporary()
        local = distributed.LocalCluster(
            n_workers=number,
            threads_per_worker=1,
            processes=True,
            resources=resources,
            memory_limit=0,
            security=security,
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            local_directory=str(scratch),
            host="127.0.0.1",
            silence_logs=logging.CRITICAL,
        )
        _log_to(folder / LOG)  # the line above has silenced our own side too
        try:
            yield lambda wait_s: distributed.Client(
                local, security=security, timeout=wait_s, set_as_default=False
            )
        finally:
            with contextlib.suppress(Exception):
                local.close(timeout=CALL_S)
            shutil.rmtree(scratch, ignore_errors=True)


def _log_to(path: Path) -> None:
    """What Dask says goes to a file: it says a lot where a worker dies, and it is not ours."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("distributed", "asyncio", "tornado"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
