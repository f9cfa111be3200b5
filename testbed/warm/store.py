# SPDX-License-Identifier: Apache-2.0
"""Saved machines on disk: whole or not there, verified before use, and not too many.

``CACHE/warm/KEY/`` holds ``memory`` and ``state``, and ``snapshot.json``, which says how long they
are, what their checksums are, and its own. The folder is made under another name and renamed
(:func:`testbed.host.product.building`), so a killed save leaves nothing that anyone would use.
All of it is readable by this user only; keys of racks are not in it (``guest_agent/resume.py``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from testbed.errors import HostError
from testbed.host import product
from testbed.topology.units import GIB
from testbed.warm import memory
from testbed.warm.memory import OpenMemory, Runs

FORMAT = 5
MEMORY, STATE, INDEX = "memory", "state", "snapshot.json"
DEFAULT_BUDGET_BYTES = 8 * GIB
HOST_LACKS = (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE)
_LOCK = ".lock"
_GONE = ".gone-"
_SKEW_S = 3600.0  # between the clocks of machines that share a cache


@dataclass(frozen=True)
class Snapshot:
    """One saved machine.

    ``memory``   its file, open (:mod:`testbed.warm.memory`); ``runs``: where that is not zero.
    ``state``    of its devices, as it was read: an entry may be pruned while it is restored.
    ``modules``  kernel modules of ours that are loaded in it.
    """

    folder: Path
    memory: OpenMemory
    state: bytes = field(repr=False)
    size_bytes: int
    runs: Runs
    memory_xxh3: str
    state_sha256: str
    modules: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """All that it was made from, as a hash."""
        return self.folder.name

    def damage(self) -> str:
        """What is wrong with its files; "" if they are as they were written.

        :raises OSError: they cannot be read, which may be the host's fault.
        """
        if hashlib.sha256(self.state).hexdigest() != self.state_sha256:
            return f"{self.folder / STATE} is not as it was written"
        found = memory.checksum(self.memory.fd, self.runs, self.size_bytes)
        if found != self.memory_xxh3:
            return f"{self.folder / MEMORY} is not as it was written"
        return ""


@dataclass(frozen=True)
class Kept:
    """One entry as `testbed cache` shows it; ``used_s`` is a time since the epoch."""

    key: str
    size_bytes: int
    used_s: float
    names: str


class Store:
    """The saved machines of one cache.

    :param folder: made on first use, mode 0700.
    :param budget_bytes: more than that is not kept; the least recently used go.
    """

    def __init__(self, folder: Path, budget_bytes: int = DEFAULT_BUDGET_BYTES) -> None:
        self.folder = folder
        self._budget_bytes = budget_bytes

    def find(self, key: str) -> Snapshot | None:
        """The entry of that key, and note that it was used; None if there is none that is whole.

        :raises HostError: it cannot be looked at, which is not the entry's fault.
        """
        index = self.folder / key / INDEX
        was_there = index.parent.exists()  # one that another harness makes now is whole
        body = _read_index(index)
        if not isinstance(body, dict) or body.pop("self", None) != _digest(body):
            if was_there:
                self.discard(key)
            return None
        with contextlib.suppress(OSError):
            os.utime(index)
        try:
            opened = OpenMemory(index.parent / MEMORY)
            state = (index.parent / STATE).read_bytes()
        except OSError as error:
            _if_the_host_lacks(error)
            self.discard(key)
            return None
        runs = tuple((int(start), int(length)) for start, length in body["runs"])
        return Snapshot(
            index.parent,
            opened,
            state,
            int(body["size_bytes"]),
            runs,
            body["memory_xxh3"],
            body["state_sha256"],
            tuple(body["modules"]),
        )

    @contextlib.contextmanager
    def exclusive(self, key: str, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Be the only one who makes this entry; ``waits`` is called once if another one does.

        :raises SetupError: another one has been at it for too long.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        told = False

        def waiting() -> None:
            nonlocal told
            if not told:
                waits()
            told = True

        with product.exclusive(self.folder / f"{key}{_LOCK}", waiting):
            yield

    @contextlib.contextmanager
    def making(self, key: str) -> Iterator[Path]:
        """A folder for :data:`MEMORY` and :data:`STATE`; within :meth:`exclusive`.

        :raises SetupError: no space; nothing is left then.
        """
        with product.building(self.folder / key) as partial:
            partial.chmod(0o700)
            yield partial

    def describe(
        self, partial: Path, runs: Runs, names: str, modules: tuple[str, ...] = ()
    ) -> None:
        """Write the index of what :meth:`making` made."""
        for name in (MEMORY, STATE):
            (partial / name).chmod(0o600)
        opened = OpenMemory(partial / MEMORY)
        size_bytes = os.fstat(opened.fd).st_size
        body: dict[str, Any] = {
            "format": FORMAT,
            "names": names,
            "modules": list(modules),
            "size_bytes": size_bytes,
            "runs": [list(run) for run in runs],
            "memory_xxh3": memory.checksum(opened.fd, runs, size_bytes),
            "state_sha256": hashlib.sha256((partial / STATE).read_bytes()).hexdigest(),
        }
        product.write_json(partial / INDEX, body | {"self": _digest(body)})
        (partial / INDEX).chmod(0o600)

    def discard(self, key: str) -> None:
        """Remove an entry that does not fit or is damaged: at once it is not there any more."""
        gone = self.folder / f"{_GONE}{key}-{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):
            (self.folder / key).rename(gone)
            product.remove_tree(gone)

    def kept(self) -> list[Kept]:
        """All entries, the most recently used first."""
        found = []
        for index in self.folder.glob(f"[!.]*/{INDEX}"):
            with contextlib.suppress(OSError):
                size_bytes = sum(_disk_bytes(path) for path in index.parent.iterdir())
                body = product.read_json(index)
                names = str(body.get("names", "")) if isinstance(body, dict) else ""
                found.append(Kept(index.parent.name, size_bytes, index.stat().st_mtime, names))
        # A clock that has been put back leaves times that are to come: those entries have not been
        # used since.
        now_s = time.time() + _SKEW_S
        return sorted(found, key=lambda entry: (entry.used_s > now_s, -entry.used_s))

    def prune(self, budget_bytes: int | None = None) -> list[Kept]:
        """Remove what is over the budget, and what killed saves left; returns what went."""
        left_bytes = self._budget_bytes if budget_bytes is None else budget_bytes
        gone = []
        for entry in self.kept():
            left_bytes -= entry.size_bytes
            if left_bytes < 0:
                self.discard(entry.key)
                gone.append(entry)
        for left in self.folder.glob(f"{_GONE}*"):  # by who was killed while removing it
            with contextlib.suppress(OSError):
                product.remove_tree(left)
        for partial in self.folder.glob(".*.*"):
            key = partial.name.split(".")[1]
            with self._if_nobody_makes(key) as alone:
                if alone:
                    product.remove_tree(partial)
        return gone

    @contextlib.contextmanager
    def _if_nobody_makes(self, key: str) -> Iterator[bool]:
        descriptor = os.open(
            self.folder / f"{key}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
        finally:
            os.close(descriptor)


def _read_index(index: Path) -> Any:
    """What it says, None if that is nothing. :raises HostError: as :meth:`Store.find`."""
    try:
        return json.loads(index.read_bytes())
    except OSError as error:
        _if_the_host_lacks(error)
    except ValueError:
        pass
    return None


def _if_the_host_lacks(error: OSError) -> None:
    if error.errno in HOST_LACKS:
        raise HostError(f"{error.filename}: {error.strerror}") from error


def _disk_bytes(path: Path) -> int:
    """What a file takes, which for one with holes is less than its length (stat(2))."""
    return path.stat().st_blocks * 512


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def entry_data(entry: Kept) -> dict[str, Any]:
    """For JSON."""
    return asdict(entry)
