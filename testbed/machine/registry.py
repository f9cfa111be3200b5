# SPDX-License-Identifier: Apache-2.0
"""Which racks run: one folder each, whose lock tells the truth.

::

    BASE/racks/NAME/            mode 0700; BASE is the user's runtime folder
        lock                    flock: taken before the folder gets its name, then the keeper's
        keeper.sock             see testbed.machine.keeper
        rack.json               what a later command must know (RackRecord)
        NODE/                   the QEMU's working folder with its sockets
            log -> RUN/NODE     its part of the run folder, which is kept

No two processes can meet half a rack: a folder is filled and locked under another name
(``.new-…``) and appears by rename(2), which fails if the name is taken; it disappears by rename
too (``.gone-…``). Whoever ends a stale folder takes its lock first, and a rack that lives holds it.

:func:`reserve` a name, :func:`list_racks`, :func:`find` one, :func:`clean` what died.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from testbed.errors import HostError, InputError, NoSuchRack, RackNameInUse
from testbed.machine.children import GONE_PREFIX, remove_runtime_folder, remove_tree
from testbed.machine.keeper import SOCKET
from testbed.machine.rack_record import RECORD, RackRecord, read_record
from testbed.machine.sockets import ask

LOCK = "lock"
NEW_PREFIX = ".new-"
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,38}[a-z0-9])?", re.ASCII | re.IGNORECASE)

NEW_AGE_S = 60.0  # a folder in the making that is older has lost its maker
BUSY_S = 3.0  # how long a lock may be held by nobody who answers: a start, an end, a cleaner
STATUS_TIMEOUT_S = 2.0
PAUSE_S = 0.02


class RackState(StrEnum):
    """What `ps` says of a rack."""

    STARTING = "starting"
    RUNNING = "running"
    DEGRADED = "degraded"  # some of its processes ended
    DEAD = "dead"  # all of its machines ended; the keeper waits for `down`
    UNRESPONSIVE = "unresponsive"  # the keeper lives and does not answer


@dataclass(frozen=True)
class RackInfo:
    """One rack as it is now.

    ``processes``  the keeper's answer to ``status``: name, kind, state, pid, exit_status, times.
    ``record``     None if it is not written yet or cannot be read.
    """

    name: str
    folder: Path
    state: RackState
    keeper_pid: int = 0
    detached: bool = False
    processes: tuple[Mapping[str, Any], ...] = ()
    record: RackRecord | None = None


class Reservation:
    """A rack's name and folder, ours until the keeper has them or :meth:`release`.

    As a context manager it releases at the end, unless :meth:`hand_over` was called before.
    """

    def __init__(self, name: str, folder: Path, lock_fd: int) -> None:
        self.name = name
        self.folder = folder
        self.lock_fd = lock_fd

    def write_record(self, record: RackRecord) -> None:
        """Write rack.json; a reader sees the old or the new one, never half of one.

        :raises HostError: it cannot be written.
        """
        path = self.folder / RECORD
        fresh = path.with_suffix(".new")
        with _host_errors(f"cannot write {path}"):
            fresh.write_text(json.dumps(record.to_json()))
            fresh.chmod(0o600)
            fresh.replace(path)

    def hand_over(self) -> None:
        """The keeper holds the lock now; forget ours."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def release(self) -> None:
        """Give the name back and remove the folder; safe to call twice."""
        if self.lock_fd < 0:
            return
        with contextlib.suppress(OSError):
            if _is_lock_of(self.lock_fd, self.folder):
                remove_runtime_folder(str(self.folder))
        self.hand_over()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def reserve(base: Path, name: str, *, unique: bool = False) -> Reservation:
    """Take a rack's name, at once and for one process only.

    ``unique``: if it is taken, take ``NAME-2``, ``NAME-3`` … instead.

    :raises InputError: no such name can be.
    :raises RackNameInUse: it is taken and ``unique`` is false.
    :raises HostError: the runtime folder cannot be written.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"'{name}' is no name for a rack",
            hint="1 to 40 letters, digits, '-', '_' and '.', beginning and ending with one of"
            " the first two",
        )
    clean(base)
    number = 1
    while True:
        chosen = name if number == 1 else f"{name[:36].rstrip('-._')}-{number}"
        try:
            return _reserve(base / "racks", chosen)
        except RackNameInUse:
            if not unique:
                raise
            number += 1


def _reserve(racks: Path, name: str) -> Reservation:
    folder = racks / name
    fresh = racks / f"{NEW_PREFIX}{name}-{os.urandom(4).hex()}"
    with _host_errors(f"cannot make {folder}"):
        racks.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.mkdir(mode=0o700)
        lock_fd = -1
        try:
            lock_fd = os.open(fresh / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _take_name(fresh, folder)
        except BaseException:
            remove_tree(str(fresh))
            if lock_fd >= 0:
                os.close(lock_fd)
            raise
    return Reservation(name, folder, lock_fd)


def _take_name(fresh: Path, folder: Path) -> None:
    deadline_s = time.monotonic() + BUSY_S
    while True:
        try:
            fresh.rename(folder)
            return
        except OSError as error:
            # A folder of that name is, or was a moment ago, in the way.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if clean_folder(folder):
            continue
        # The lock is held: by a rack, or for a moment by one that starts, ends or cleans.
        if _answers(folder) or time.monotonic() > deadline_s:
            raise RackNameInUse(
                f"a rack named '{folder.name}' runs already",
                hint=f"take another name (--name), or end it: testbed down {folder.name}",
            )
        time.sleep(PAUSE_S)


def clean(base: Path) -> None:
    """Remove what dead keepers, and commands that died while starting one, left behind."""
    for folder in _folders(base / "racks"):
        with contextlib.suppress(OSError):
            if not folder.name.startswith("."):
                clean_folder(folder)
            elif folder.name.startswith(GONE_PREFIX) or (
                folder.name.startswith(NEW_PREFIX)
                and time.time() - folder.stat().st_mtime > NEW_AGE_S
            ):
                with _stale_lock(folder) as stale:
                    if stale:
                        remove_tree(str(folder))


def clean_folder(folder: Path) -> bool:
    """Remove one rack's folder if nobody holds its lock; true if the name is free now."""
    with _stale_lock(folder) as stale:
        if stale:
            remove_runtime_folder(str(folder))
    return stale or not folder.exists()


@contextlib.contextmanager
def _stale_lock(folder: Path) -> Iterator[bool]:
    """Inside: whether the folder is there and nobody's, and then it is ours alone."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # A rack has its lock from the first moment: this one is gone, and its name may be taken
        # again in the next. A name in the making or on its way out is used once.
        yield folder.name.startswith(".")
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            # Between open and flock the folder may have gone and its name have a new owner.
            yield _is_lock_of(fd, folder)
    finally:
        os.close(fd)


def _is_lock_of(fd: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), (folder / LOCK).stat())
    except FileNotFoundError:
        return False


def _answers(folder: Path) -> bool:
    """A keeper lives there, if perhaps too busy to say so; one that dies closes its socket."""
    try:
        _ask_status(folder)
    except TimeoutError:
        return True
    except (OSError, ValueError, KeyError):
        return False
    return True


def _ask_status(folder: Path) -> dict[str, Any]:
    question = {"id": 0, "call": "status"}
    status: dict[str, Any] = ask(folder / SOCKET, question, STATUS_TIMEOUT_S)["result"]
    return status


def _folders(racks: Path) -> list[Path]:
    try:
        return sorted(path for path in racks.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError(f"cannot read {racks}: {error.strerror}") from error


def list_racks(base: Path) -> list[RackInfo]:
    """Every rack that lives, by name; what died is cleaned on the way.

    :raises HostError: the runtime folder cannot be read.
    """
    clean(base)
    infos = []
    for folder in _folders(base / "racks"):
        if not folder.name.startswith(".") and (info := _inspect(folder)) is not None:
            infos.append(info)
    return infos


def find(base: Path, name: str) -> RackInfo:
    """The rack of that name.

    :raises NoSuchRack: none runs; the hint names those that do.
    """
    folder = base / "racks" / name
    if NAME.fullmatch(name) and folder.is_dir() and (info := _inspect(folder)) is not None:
        return info
    names = [info.name for info in list_racks(base)]
    raise NoSuchRack(
        f"no rack named '{name}' runs",
        hint=f"there is: {', '.join(names)}" if names else "no rack runs; 'testbed up' starts one",
    )


def _inspect(folder: Path) -> RackInfo | None:
    """None if it is gone, or goes while we look."""
    record = read_record(folder)
    deadline_s = time.monotonic() + STATUS_TIMEOUT_S
    while True:
        try:
            status = _ask_status(folder)
        except TimeoutError:
            return RackInfo(folder.name, folder, RackState.UNRESPONSIVE, record=record)
        except (OSError, ValueError, KeyError):
            if clean_folder(folder):
                return None
            if time.monotonic() > deadline_s:  # reserved, and no keeper yet
                return RackInfo(folder.name, folder, RackState.STARTING, record=record)
            time.sleep(PAUSE_S)
            continue
        return RackInfo(
            name=folder.name,
            folder=folder,
            state=_state(status),
            keeper_pid=status["pid"],
            detached=status["detached"],
            processes=tuple(status["processes"]),
            record=record,
        )


def _state(status: Mapping[str, Any]) -> RackState:
    if status["starting"]:
        return RackState.STARTING
    processes = status["processes"]
    machines = [process for process in processes if process["kind"] == "qemu"]
    if all(process["state"] == "ended" for process in machines):
        return RackState.DEAD
    if any(process["state"] == "ended" for process in processes):
        return RackState.DEGRADED
    return RackState.RUNNING


@contextlib.contextmanager
def _host_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(f"{what}: {error.strerror or error}") from error
