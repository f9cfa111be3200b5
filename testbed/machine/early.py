# SPDX-License-Identifier: Apache-2.0
"""Keepers' processes, started before anyone knows which racks they will keep.

A command that will start a rack calls :func:`begin` first of all. While it imports what reads a
topology, the keeper starts on another processor, and a child of its imports the device models
(:mod:`testbed.machine.nursery`). The first rack takes it. If none does, it ends with the command.

A command that starts a second rack, or says at once that it will, has a mother made
(:mod:`testbed.machine.keeper_mother`): one process that has imported all that, of which each
further keeper is a fork. Without her, keepers are started one by one.

This module is imported before everything else, so it needs next to nothing itself.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import signal
import socket
import sys
from _thread import allocate_lock  # threading's own, without the rest of it

ROOT = __file__.rpartition("/testbed/")[0]
LAUNCHER = (
    "import sys; sys.path.append(sys.argv[1]); from testbed.machine.keeper_main import main; main()"
)
MOTHER = LAUNCHER.replace("keeper_main", "keeper_mother")
MODELS = "testbed.models.lean"
MOTHER_TIMEOUT_S = 15.0  # one that was just begun has to import the models first
MOTHER_END_S = 2.0


class Started:
    """A keeper that waits to be told its rack.

    :param wire: the owner's end. :param ended: a pidfd: who its parent is may differ.
    """

    def __init__(self, wire: socket.socket, pid: int, ended: int) -> None:
        self.wire = wire
        self.pid = pid
        self.ended = ended

    def close(self) -> None:
        """Nobody needs it: it ends."""
        self.wire.close()
        os.close(self.ended)


class Keepers:
    """Where one command's keepers come from; threads may share it.

    A mother is made at most once: if she dies, keepers are started one by one again.
    """

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._waiting: list[Started] = []
        self._mother: Started | None = None
        self._owner = os.getpid()  # a fork of it may not speak to her
        self._several = False
        self._bereaved = False

    def begin(self, *, several: bool = False) -> None:
        """Start a keeper, if none waits; or a mother, for several. An error is met again later."""
        with self._lock:
            try:
                if several:
                    self._ask_for_mother(MODELS)
                elif not self._waiting:
                    self._waiting.append(_start(LAUNCHER, MODELS))
            except OSError:
                return

    def take(self, module: str = "") -> Started:
        """The keeper that waits, or a new one.

        :param module: what a new one is to import for the first helper that wants it.
        :raises OSError: it cannot be started.
        """
        with self._lock:
            several, self._several = self._several, True
            if self._waiting:
                return self._waiting.pop()
            if several and (born := self._bear(module)):
                return born
            return _start(LAUNCHER, module)

    def end(self) -> None:
        """End the mother, not her keepers; and a keeper that still waits."""
        with self._lock:
            while self._waiting:
                self._waiting.pop().close()
            self._bury()

    def _ask_for_mother(self, module: str) -> Started | None:
        self._several = True
        if os.getpid() != self._owner:
            return None
        if self._mother is None and not self._bereaved:
            self._mother = _start(MOTHER, module)
            self._mother.wire.settimeout(MOTHER_TIMEOUT_S)
            atexit.register(self.end)
        return self._mother

    def _bear(self, module: str) -> Started | None:
        """A keeper that the mother forks; None if there is no mother, or she does not answer."""
        try:
            mother = self._ask_for_mother(module)
        except OSError:
            return None
        if mother is None:
            return None
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(mother.wire, [module.encode() or b"-"], [theirs.fileno()])
            answer, fds, _, _ = socket.recv_fds(mother.wire, 64, 1, socket.MSG_CMSG_CLOEXEC)
            if len(fds) != 1:
                raise OSError("she is dead, or cannot fork")
            return Started(ours, int(answer), fds[0])
        except BaseException as error:  # her next answer might be this one's
            ours.close()  # if she does fork one, it ends
            self._bury()
            if isinstance(error, OSError):
                return None
            raise

    def _bury(self) -> None:
        """She ends at the end of her socket; the processor time of hers is ours with that."""
        mother, self._mother = self._mother, None
        if mother is None or os.getpid() != self._owner:
            return
        import select  # noqa: PLC0415  a single start does without

        self._bereaved = True
        atexit.unregister(self.end)
        mother.wire.close()
        poll = select.poll()
        poll.register(mother.ended, select.POLLIN)
        if not poll.poll(MOTHER_END_S * 1000):
            os.kill(mother.pid, signal.SIGKILL)
        os.close(mother.ended)
        os.waitpid(mother.pid, 0)


def _start(launcher: str, module: str) -> Started:
    """A session of its own, our socket as its standard input."""
    ours, theirs = socket.socketpair(
        socket.AF_UNIX, socket.SOCK_SEQPACKET if launcher == MOTHER else socket.SOCK_STREAM
    )
    argv = [sys.executable, "-I", "-S", "-c", launcher, ROOT, *([module] if module else [])]
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
        return Started(ours, pid, os.pidfd_open(pid))
    except BaseException:
        ours.close()
        raise


_ours = Keepers()


def begin(*, several: bool = False) -> None:
    """Start what this command's first keeper needs: :meth:`Keepers.begin`."""
    _ours.begin(several=several)


def take(module: str = "") -> Started:
    """A keeper for this command: :meth:`Keepers.take`. :raises OSError: it cannot be started."""
    return _ours.take(module)
