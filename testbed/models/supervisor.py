# SPDX-License-Identifier: Apache-2.0
"""What stands between QEMU and the sudden death of a model process.

QEMU 11.1 does not survive a vfio-user connection that is reset under it. So the model process is a
child of a small one that holds a second descriptor of every connection. When the child dies, in
whatever way, its connections stay open, and the supervisor answers on them as a slot answers whose
card was pulled out: reads are all ones, all else goes nowhere. The guest sees a lost device, the
machine goes on, and the owner is told by a line on standard output.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Final

from testbed.errors import ExitCode
from testbed.models.config import Identity
from testbed.models.device import Device
from testbed.models.memory import MemoryCache
from testbed.models.server import Session

END_TIMEOUT_S: Final = 5.0
MAX_WORDS: Final = 4096


class PulledOut(Device):
    """Stands for any device that is no more."""

    identity = Identity(0xFFFF, 0xFFFF, 0xFFFFFF)


class Lifeline:
    """The child's end: tells the supervisor of connections, and of being ready."""

    def __init__(self, words: socket.socket) -> None:
        self.socket = words

    def ready(self) -> None:
        """Every socket is open."""
        self._send({"ready": True})

    def connection(self, device: Device, connection: socket.socket | None) -> None:
        """A machine has connected to that device, or (None) is gone."""
        message = {"device": device.name, "connected": connection is not None}
        self._send(message, [connection.fileno()] if connection is not None else [])

    def _send(self, message: dict[str, object], fds: list[int] | None = None) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone: this process ends anyway
            socket.send_fds(self.socket, [json.dumps(message).encode()], fds or [])


class Supervisor:
    """The parent's end, in a running loop."""

    def __init__(self, pid: int, words: socket.socket, owner_fd: int) -> None:
        self._pid = pid
        self._words = words
        self._owner_fd = owner_fd
        self._held: dict[str, socket.socket] = {}
        self._sessions: set[Session] = set()
        self._stop = asyncio.Event()
        self._dead = asyncio.Event()
        self._ready = asyncio.Event()

    async def run(self) -> int:
        """Until the owner is gone or SIGTERM comes; or, before it is ready, the child ends.

        Answers the exit status.
        """
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(self._pid)

        def died() -> None:
            loop.remove_reader(pidfd)
            self._dead.set()

        loop.add_reader(pidfd, died)
        loop.add_reader(self._words, self._hear)
        with contextlib.suppress(PermissionError):  # a file: it has no end to wait for
            loop.add_reader(self._owner_fd, self._owner_spoke)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        try:
            await self._first(self._dead.wait(), self._stop.wait())
            if self._dead.is_set():
                self._hear_all()
                return await self._bereaved()
            return await self._end()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            for connection in self._held.values():
                connection.close()

    @staticmethod
    async def _first(*waits: Coroutine[None, None, bool]) -> None:
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _end(self) -> int:
        """Have the child end in good order; but if it cannot even begin, let it say why."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._first(self._ready.wait(), self._dead.wait())
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(self._dead.wait(), END_TIMEOUT_S)
        except TimeoutError:
            os.kill(self._pid, signal.SIGKILL)
            await self._dead.wait()
        return _exit_status(self._pid)

    async def _bereaved(self) -> int:
        """The child is dead: stand in for its devices until the owner ends it."""
        status = _exit_status(self._pid)
        if not self._ready.is_set():
            return status
        names = sorted(self._held)
        sys.stderr.write(f"models: the model process died (status {status})\n")
        _say({"lost": names, "status": status})
        memories = MemoryCache()
        for name, connection in self._held.items():
            session = Session(
                connection, PulledOut(name), memories, self._session_ended, removed=True
            )
            self._sessions.add(session)
        self._held.clear()
        await self._stop.wait()
        for session in tuple(self._sessions):
            session.close("the supervisor ends")
        return int(ExitCode.ERROR)

    def _session_ended(self, session: Session, _reason: str) -> None:
        self._sessions.discard(session)

    def _owner_spoke(self) -> None:
        if not os.read(self._owner_fd, MAX_WORDS):
            asyncio.get_running_loop().remove_reader(self._owner_fd)
            self._stop.set()

    def _hear_all(self) -> None:
        while self._hear():
            pass

    def _hear(self) -> bool:
        """One word from the child; False if there is none."""
        fds = array.array("i")
        try:
            data, ancillary, _, _ = self._words.recvmsg(
                MAX_WORDS, socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, ancillary = b"", []
        if not data:
            asyncio.get_running_loop().remove_reader(self._words)
            return False
        for _, _, content in ancillary:
            fds.frombytes(content)
        message = json.loads(data)
        if "ready" in message:
            self._ready.set()
            _say({"ready": True, "pid": self._pid})
            return True
        before = self._held.pop(message["device"], None)
        if before is not None:
            before.close()
        if message["connected"]:
            self._held[message["device"]] = socket.socket(fileno=fds[0])
        return True


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _exit_status(pid: int) -> int:
    """Of a child that has ended; a signal's number is counted from 256, as shells cannot."""
    _, status = os.waitpid(pid, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 256 + os.WTERMSIG(status)


def supervise(child: Callable[[Lifeline], int], owner_fd: int) -> int:
    """Run ``child`` in a process of its own, and outlive it; answers the exit status."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        ours.close()
        status = int(ExitCode.ERROR)
        try:
            status = child(Lifeline(theirs))
        finally:
            sys.stderr.flush()
            os._exit(status)
    theirs.close()
    ours.setblocking(False)

    async def run() -> int:
        return await Supervisor(pid, ours, owner_fd).run()

    try:
        return min(asyncio.run(run()), 255)
    finally:
        ours.close()
