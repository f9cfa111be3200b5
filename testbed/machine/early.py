# SPDX-License-Identifier: Apache-2.0
"""A keeper's process, started before anyone knows which rack it will keep.

A command that will start a rack calls :func:`begin` first of all. While it imports what reads a
topology, the keeper starts on another processor, and a child of its imports the device models
(:mod:`testbed.machine.nursery`). The first rack takes it. If none does, it ends with the command.
This module is imported before everything else, so it needs next to nothing itself.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys

ROOT = __file__.rpartition("/testbed/")[0]
LAUNCHER = (
    "import sys; sys.path.append(sys.argv[1]); from testbed.machine.keeper import main; main()"
)
MODELS = "testbed.models.lean"

_waiting: list[tuple[socket.socket, int]] = []


def begin() -> None:
    """Start one, if none waits. An error is left to :func:`take`, which meets it again."""
    if not _waiting:
        try:
            _waiting.append(_start(MODELS))
        except OSError:
            return


def take(module: str = "") -> tuple[socket.socket, int]:
    """The keeper that waits, or a new one: its socket and its process.

    :param module: what a new one is to import for the first helper that wants it.
    :raises OSError: it cannot be started.
    """
    return _waiting.pop() if _waiting else _start(module)


def _start(module: str) -> tuple[socket.socket, int]:
    """A session of its own, our socket as its standard input."""
    ours, theirs = socket.socketpair()
    argv = [sys.executable, "-I", "-S", "-c", LAUNCHER, ROOT, *([module] if module else [])]
    try:
        with theirs:
            # A descriptor that is to be copied must not be one that is copied over.
            end = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 10)
            try:
                # Not subprocess: a keeper outlives us, which Popen calls a resource leak.
                pid = os.posix_spawn(
                    argv[0],
                    argv,
                    {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, end, 0),
                        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                    ],
                    setsid=True,
                    setsigmask=[],
                    setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE],
                )
            finally:
                os.close(end)
    except BaseException:
        ours.close()
        raise
    return ours, pid
