# SPDX-License-Identifier: Apache-2.0
"""What stands between QEMU and the sudden death of a device model.

QEMU 11.1 does not survive a vfio-user connection that is reset under it. So each device has a
process of its own, a child of one small supervisor that holds a second descriptor of every
connection. When a child dies, in whatever way, its connection stays open, and the supervisor
answers on it as a slot answers whose card was pulled out: reads are all ones, all else goes
nowhere. The guest sees one lost device; the machine and the other devices go on.

The supervisor also serves the control socket (:mod:`testbed.models.hub`), tells the devices how the
machine's switches route (:mod:`testbed.models.switchyard`) and carries what goes from one device to
another's registers.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from testbed.errors import ExitCode
from testbed.models.calls import CallFailed, answer_calls
from testbed.models.config import Identity
from testbed.models.control import REGISTER
from testbed.models.device import Device
from testbed.models.hub import Hub, Member, Refused
from testbed.models.memory import MemoryCache
from testbed.models.progress import Progress
from testbed.models.server import Session
from testbed.models.switchyard import NoTree, Switchyard

END_TIMEOUT_S: Final = 5.0
MAX_WORDS: Final = 4096
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class PulledOut(Device):
    """Stands for any device that is no more."""

    identity = Identity(0xFFFF, 0xFFFF, 0xFFFFFF)


class Lifeline:
    """A child's end: tells the supervisor of connections, and of being ready.

    ``words`` carries that; ``calls`` is a stream of control requests, one JSON object a line, and
    ``questions`` one of what the device asks (:mod:`testbed.models.calls`). ``progress``
    outlives the child, with what it was in the middle of.
    """

    def __init__(
        self,
        words: socket.socket,
        calls: socket.socket,
        questions: socket.socket,
        progress: Progress,
    ) -> None:
        self.socket = words
        self.calls = calls
        self.questions = questions
        self.progress = progress

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


ChildMain = Callable[[Lifeline], int]


@dataclass
class _Child:
    """One device's process, as its supervisor sees it."""

    name: str
    pid: int
    words: socket.socket
    calls: socket.socket
    questions: socket.socket
    progress: Progress
    held: socket.socket | None = None  # a second descriptor of its machine's connection
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    dead: asyncio.Event = field(default_factory=asyncio.Event)
    status: int = 0  # valid once it is dead; see `_exit_status`

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The supervisor's ends of what connects the two."""
        return self.words, self.calls, self.questions


class Supervisor:
    """The parent's end, in a running loop."""

    def __init__(
        self,
        children: Mapping[str, _Child],
        control: Path,
        ready: Path | None,
        owner_fd: int,
        switchyard: Switchyard | None,
    ) -> None:
        self._children = children
        self._ready = ready
        self._owner_fd = owner_fd
        self._sessions: set[Session] = set()
        self._stop = asyncio.Event()
        self._failed = asyncio.Event()  # one ended before it was ready
        self._serving = False
        self._bereaved = False
        self._switchyard = switchyard
        self._answering: list[asyncio.Task[None]] = []
        self._hub = Hub(
            control,
            {child.name: Member(child.pid, child.calls) for child in children.values()},
            {"routes": self._routes, "tree": self._tree},
        )

    async def run(self) -> int:
        """Until the owner is gone or SIGTERM comes; or, before all are ready, a child ends.

        Answers the exit status: that of the first child that failed, if one did.
        """
        loop = asyncio.get_running_loop()
        for child in self._children.values():
            self._watch(child)
            answer = answer_calls(child.questions, partial(self._answer, child.name))
            self._answering.append(loop.create_task(answer))
        if self._owner_fd >= 0:
            with contextlib.suppress(PermissionError):  # a file: it has no end to wait for
                loop.add_reader(self._owner_fd, self._owner_spoke)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        try:
            await self._begin()
            if not self._failed.is_set():
                await self._stop.wait()
            return await self._end()
        finally:
            for task in self._answering:
                task.cancel()
            if self._switchyard is not None:
                self._switchyard.close()
            for child in self._children.values():
                if child.held is not None:
                    child.held.close()

    async def _begin(self) -> None:
        """Wait until all are ready, and say so; or until one fails, or the owner goes."""
        try:
            await self._hub.open()
        except OSError as error:
            sys.stderr.write(f"models: the control socket could not be opened: {error}\n")
            self._failed.set()
            return

        async def everyone() -> None:
            for child in self._children.values():
                await child.ready.wait()

        await _first(everyone(), self._stop.wait(), self._failed.wait())
        if self._stop.is_set() or self._failed.is_set():
            return
        self._serving = True
        _say({"ready": True, "pids": {name: child.pid for name, child in self._children.items()}})
        if self._ready is not None:
            self._ready.touch(mode=0o600)

    def _watch(self, child: _Child) -> None:
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(child.pid)

        def died() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            while self._hear(child):  # its last words: which connections there are
                pass
            child.status = _exit_status(child.pid)
            child.dead.set()
            if self._serving and not self._stop.is_set():
                self._stand_in(child)
            elif not self._serving:
                self._failed.set()

        loop.add_reader(pidfd, died)
        loop.add_reader(child.words, self._hear, child)

    async def _end(self) -> int:
        """Have the children end in good order; but if one cannot even begin, let it say why."""
        living = [child for child in self._children.values() if not child.dead.is_set()]
        for child in living:
            # Before it is ready it may not have its signal handlers.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_TIMEOUT_S):
                    await _first(child.ready.wait(), child.dead.wait())
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
        for child in living:
            try:
                await asyncio.wait_for(child.dead.wait(), END_TIMEOUT_S)
            except TimeoutError:
                os.kill(child.pid, signal.SIGKILL)
                await child.dead.wait()
        for session in tuple(self._sessions):
            session.close("the supervisor ends")
        self._hub.close()
        if self._ready is not None:
            self._ready.unlink(missing_ok=True)
        if self._bereaved:
            return int(ExitCode.ERROR)
        return next((child.status for child in self._children.values() if child.status), 0) or (
            int(ExitCode.ERROR) if self._failed.is_set() else 0
        )

    def _stand_in(self, child: _Child) -> None:
        """The child is dead: answer for its device until the owner ends it all."""
        self._bereaved = True
        sys.stderr.write(f"device {child.name}: its model died (status {child.status})\n")
        _say({"lost": child.name, "status": child.status})
        self._hub.lose(child.name, child.status)
        if child.held is not None:
            received = child.progress.settle(child.held)
            session = Session(
                child.held,
                PulledOut(child.name),
                MemoryCache(),
                self._session_ended,
                removed=True,
                received=received,
            )
            self._sessions.add(session)
            child.held = None

    def _session_ended(self, session: Session, _reason: str) -> None:
        self._sessions.discard(session)

    async def _answer(self, device: str, method: str, params: Mapping[str, Any]) -> Any:
        """What a device's process asks; CallFailed if there is no answer."""
        try:
            if method == REGISTER:
                return await self._hub.call(params["device"], REGISTER, params)
            return await self._ask_switchyard().routes(device, params["seen"])
        except (NoTree, Refused) as error:
            raise CallFailed(str(error)) from error

    def _ask_switchyard(self) -> Switchyard:
        if self._switchyard is None:
            raise Refused("InputError", "the specification names no machine to ask")
        return self._switchyard

    async def _routes(self, params: Mapping[str, Any]) -> Any:
        """{device} → what becomes of its requests: by range, where they end and why; the rest goes
        upstream. As the machine stands now.
        """
        name = self._hub.named(params)
        try:
            return (await self._ask_switchyard().routes(name))["routes"]
        except NoTree as error:
            raise Refused("NoTree", str(error)) from error

    async def _tree(self, _params: Mapping[str, Any]) -> Any:
        """The machine's PCI tree as it stands now."""
        try:
            return await self._ask_switchyard().tree()
        except NoTree as error:
            raise Refused("NoTree", str(error)) from error

    def _owner_spoke(self) -> None:
        if not os.read(self._owner_fd, MAX_WORDS):
            asyncio.get_running_loop().remove_reader(self._owner_fd)
            self._stop.set()

    def _hear(self, child: _Child) -> bool:
        """One word from the child; False if there is none."""
        fds = array.array("i")
        try:
            data, ancillary, _, _ = child.words.recvmsg(
                MAX_WORDS, socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, ancillary = b"", []
        if not data:
            asyncio.get_running_loop().remove_reader(child.words)
            return False
        for _, _, content in ancillary:
            fds.frombytes(content)
        message = json.loads(data)
        if "ready" in message:
            child.ready.set()
            return True
        if child.held is not None:
            child.held.close()
        child.held = socket.socket(fileno=fds[0]) if message["connected"] else None
        return True


async def _first(*waits: Coroutine[None, None, object]) -> None:
    """Return when one of them does; the others are given up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _exit_status(pid: int) -> int:
    """Of a child that has ended; a signal's number is counted from 256, as shells cannot."""
    _, status = os.waitpid(pid, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 256 + os.WTERMSIG(status)


def _fork(name: str, main: ChildMain, others: list[_Child]) -> _Child:
    words, their_words = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    calls, their_calls = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    questions, their_questions = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    progress = Progress()
    supervisor = os.getpid()
    pid = os.fork()
    if not pid:
        status = int(ExitCode.ERROR)
        try:
            # A model that hangs must not outlive its supervisor either.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == supervisor:
                for end in (words, calls, questions, *(s for c in others for s in c.sockets)):
                    end.close()
                status = main(Lifeline(their_words, their_calls, their_questions, progress))
        finally:
            sys.stderr.flush()
            os._exit(status)
    their_words.close()
    their_calls.close()
    their_questions.close()
    words.setblocking(False)
    return _Child(name, pid, words, calls, questions, progress)


def supervise(
    children: Mapping[str, ChildMain],
    *,
    control: Path,
    ready: Path | None = None,
    owner_fd: int = -1,
    switchyard: Switchyard | None = None,
) -> int:
    """Run each of ``children`` in a process of its own, and outlive them.

    :param control: the control socket to serve. :param ready: a file to make when all serve.
    :param owner_fd: its end of file is the end, as SIGTERM is; -1 for none.
    :param switchyard: knows the machine's switches; closed here.
    :returns: the exit status.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    forked: list[_Child] = []
    for name, main in children.items():
        forked.append(_fork(name, main, forked))

    async def run() -> int:
        by_name = {child.name: child for child in forked}
        return await Supervisor(by_name, control, ready, owner_fd, switchyard).run()

    try:
        return min(asyncio.run(run()), 255)
    finally:
        for child in forked:
            for end in child.sockets:
                end.close()
