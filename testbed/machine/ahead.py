# SPDX-License-Identifier: Apache-2.0
"""A rack that is started as the same command started it the last time, before its topology is read.

Reading a topology, placing it and making command lines of it takes as long as all processes take to
start. So a warm start keeps what it told its keeper (``CACHE/remembered/ahead-KEY.json``), and the
next one of the same words tells that to a keeper at once. It then works everything out as ever, and
compares: what is not exactly the same ends the rack, and starts it anew. So what is remembered is
never believed. The restored machine waits meanwhile, and has not been told whose it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from testbed.errors import TestbedError
from testbed.host import paths, product
from testbed.machine import spawn
from testbed.machine.client import END_TIMEOUT_S, Keeper
from testbed.machine.processes import Plan, make_folders
from testbed.machine.registry import Reservation, reserve

_RACK, _RUN = "@RACK@", "@RUN@"  # stand for the rack's folders in what is remembered
_COPY = "copy"
_KEPT = 64  # entries


class AnotherRack(Exception):
    """What was started ahead is not what is wanted; it has ended."""


@dataclass
class Ahead:
    """A rack on its way, whose command has still to find out whether it is the one it wants.

    As a context manager it gives its reservation; an error before :meth:`keeper_of` ends it, and
    becomes AnotherRack if the rack's own start had failed.

    ``opened``  the files of its memory, by name: what they were when it began.
    """

    reservation: Reservation
    run_dir: Path
    keeper: Keeper
    told: Mapping[str, Any]
    opened: Mapping[str, int]
    begun: Future[None]
    taken: bool = False

    def keeper_of(self, plan: Plan, files: Mapping[str, str | Path]) -> Keeper:
        """Its keeper, when all processes run.

        :param files: what they read in its folder: texts, or paths of what was copied.
        :raises AnotherRack: these are other processes, or one did not start.
        """
        wanted = _told(plan, files, self.reservation.folder, self.run_dir)
        if wanted != self.told or not self._same_files(plan):
            raise AnotherRack
        self.begun.result()
        self.taken = True
        self._close_files()
        return self.keeper

    def _same_files(self, plan: Plan) -> bool:
        return all(
            os.path.samestat(os.fstat(fd), Path(str(plan.memory[name])).stat())
            for name, fd in self.opened.items()
        )

    def _close_files(self) -> None:
        for fd in self.opened.values():
            os.close(fd)
        self.opened = {}

    def __enter__(self) -> Reservation:
        return self.reservation

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or self.taken:
            return
        self.end()
        failed = not self.begun.done() or self.begun.exception() is not None
        if failed and isinstance(error, TestbedError | OSError):
            raise AnotherRack from error

    def end(self) -> None:
        """It is not wanted."""
        with contextlib.suppress(TestbedError):
            self.keeper.shutdown()
        with contextlib.suppress(TimeoutError):
            self.begun.exception(END_TIMEOUT_S)  # it has noticed too, and let go
        self.keeper.close()
        self._close_files()
        shutil.rmtree(self.run_dir, ignore_errors=True)


_begun: dict[str, Ahead] = {}  # by the rack's name; at most one
_words: list[str] = []  # of this command


def begin(words: Sequence[str]) -> None:
    """Start what the command of these words started the last time, if that is known."""
    _words[:] = words
    stored = product.read_json(_file(words))
    try:
        name, told = stored["name"], stored["told"]
        reservation = reserve(paths.runtime_dir(), name)
    except (TestbedError, TypeError, KeyError):
        return  # it is said later, by who looks closer
    run_dir = paths.new_run_dir(name).resolve()
    try:
        _begun[name] = _begin(reservation, run_dir, told)
    except (TestbedError, OSError, TypeError, KeyError, ValueError):
        reservation.release()
        shutil.rmtree(run_dir, ignore_errors=True)


def _begin(reservation: Reservation, run_dir: Path, told: Mapping[str, Any]) -> Ahead:
    run_dir.mkdir(mode=0o700, parents=True)
    places = {_RACK: str(reservation.folder), _RUN: str(run_dir)}
    opened: dict[str, int] = {}
    try:
        return _launched(reservation, run_dir, told, places, opened)
    except BaseException:
        for fd in opened.values():
            os.close(fd)
        raise


def _launched(
    reservation: Reservation,
    run_dir: Path,
    told: Mapping[str, Any],
    places: Mapping[str, str],
    opened: dict[str, int],
) -> Ahead:
    for name, path in told["memory"].items():
        if isinstance(path, str):
            opened[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    memory = {name: f"/proc/{os.getpid()}/fd/{fd}" for name, fd in opened.items()}
    plan = Plan(_replaced(told["processes"], places), told["memory"] | memory)
    for process in plan.processes:
        make_folders(Path(process["folder"]), Path(process["log"]).parent)
    for place, content in told["files"].items():
        target = reservation.folder / place
        target.touch(mode=0o600)
        if isinstance(content, str):
            target.write_text(content)
        else:
            target.write_bytes(Path(content[_COPY]).read_bytes())
    keeper = spawn.launch(reservation, plan, run_dir)
    begun: Future[None] = Future()

    def start() -> None:
        try:
            spawn.begin(keeper, plan)
            begun.set_result(None)
        except BaseException as error:  # raised where it is waited for
            begun.set_exception(error)

    Thread(target=start, name=f"start {reservation.name}", daemon=True).start()
    return Ahead(reservation, run_dir, keeper, told, opened, begun)


def take(name: str) -> Ahead | None:
    """What was started under that name; who takes it, owns it."""
    return _begun.pop(name, None)


def end() -> None:
    """End what nobody took."""
    while _begun:
        _begun.popitem()[1].end()


def remember(keeper: Keeper, plan: Plan, files: Mapping[str, str | Path]) -> None:
    """Keep what ``keeper`` was told, for the next :func:`begin` of the words of this one.

    If it cannot be written, it is not.
    """
    if not _words:
        return
    file = _file(_words)
    told = _told(plan, files, keeper.folder, keeper.run_folder)
    with contextlib.suppress(OSError):
        product.write_json(file, {"name": keeper.name, "told": told})
        kept = sorted(file.parent.glob("ahead-*.json"), key=lambda path: path.stat().st_mtime_ns)
        for old in kept[:-_KEPT]:
            old.unlink(missing_ok=True)


def _told(plan: Plan, files: Mapping[str, str | Path], rack: Path, run: Path) -> dict[str, Any]:
    places = {str(rack): _RACK, str(run): _RUN}
    # A file of memory is named by a descriptor of ours, which another command has not.
    memory = {
        name: os.path.realpath(value) if isinstance(value, str) else value
        for name, value in plan.memory.items()
    }
    contents = {
        place: content if isinstance(content, str) else {_COPY: str(content)}
        for place, content in files.items()
    }
    told = {"processes": _replaced(plan.processes, places), "memory": memory, "files": contents}
    value: dict[str, Any] = json.loads(json.dumps(told))  # as it is read again
    return value


def _replaced(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for before, after in places.items():
            value = value.replace(before, after)
        return value
    if isinstance(value, Mapping):
        return {key: _replaced(each, places) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(each, places) for each in value]
    return value


def _file(words: Sequence[str]) -> Path:
    """Named after the words and where they were said; the rest is compared."""
    key = hashlib.sha256("\0".join((str(Path.cwd()), *words)).encode()).hexdigest()[:24]
    return paths.cache_dir() / "remembered" / f"ahead-{key}.json"
