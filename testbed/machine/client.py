# SPDX-License-Identifier: Apache-2.0
"""A keeper as its clients see it: calls, exits and shared memory, with a deadline on every wait.

All waits end at once, with :class:`RackGone`, if the keeper dies; a machine's own end is a value
(:class:`Exit`). A :class:`Keeper` may be used by several threads.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from testbed.errors import HostError, LaunchError, RackGone
from testbed.machine.console import read_tail
from testbed.machine.processes import Command, make_node_folder, process_value
from testbed.machine.registry import clean_folder

CALL_TIMEOUT_S = 10.0
START_TIMEOUT_S = 15.0  # the keeper's own start, and that of everything that has no `ready`
END_TIMEOUT_S = 15.0  # more than the keeper allows its children to die
KEEPER_LOG = "keeper.log"


@dataclass(frozen=True)
class Exit:
    """How a process ended; ``status`` is minus the signal's number if one killed it."""

    name: str
    status: int
    time_s: float

    def __str__(self) -> str:
        if self.status < 0:
            return f"was killed by {signal.Signals(-self.status).name}"
        return f"ended with status {self.status}"


class Keeper:
    """A rack's keeper, as a client sees it; made by :func:`start_keeper` and :func:`attach`.

    As a context manager: :meth:`close` at the end, which ends a rack that was not detached.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        run_folder: Path,
        wire: socket.socket,
        *,
        pid: int,
        ended: int = -1,
    ) -> None:
        """``ended``: a pidfd of a keeper that is ours; closed here."""
        self.name = name
        self.folder = folder
        self.run_folder = run_folder
        self.pid = pid
        self._ended = ended
        self._owner = ended >= 0  # our end is the rack's end
        self._wire = wire
        self._wire.settimeout(None)
        # A keeper that is stopped reads nothing; our lines must not wait for it for ever.
        bound = struct.pack("ll", int(CALL_TIMEOUT_S), 0)
        self._wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
        self._changed = threading.Condition()
        self._call_id = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._exits: dict[str, Exit] = {}
        self._reason = ""  # why the keeper ends, in its own words
        self._gone = False
        self._closed = False
        self._reader = threading.Thread(target=self._read, name=f"keeper {name}", daemon=True)
        self._reader.start()

    # -- what comes in ---------------------------------------------------------------------------

    def _read(self) -> None:
        inbox = bytearray()
        with contextlib.suppress(OSError, ValueError):
            while data := self._wire.recv(1 << 16):
                inbox += data
                *lines, inbox = inbox.split(b"\n")
                with self._changed:
                    for line in lines:
                        self._take(json.loads(line))
                    self._changed.notify_all()
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        event = message.get("event")
        if event is None:
            self._answers[message["id"]] = message
            for process in message.get("result", {}).get("processes", ()):
                self._note(process)
        elif event == "end":
            self._reason = message["reason"]
        else:
            self._note(message)

    def _note(self, process: Mapping[str, Any]) -> None:
        name = process["name"]
        if process["state"] == "ended":
            self._exits[name] = Exit(name, process["exit_status"], process["ended_s"])
        else:
            self._exits.pop(name, None)

    def _wait(self, timeout_s: float) -> Iterator[None]:
        """Yield at every change until the deadline; the caller holds ``_changed``."""
        deadline_s = time.monotonic() + timeout_s
        yield
        while (left_s := deadline_s - time.monotonic()) > 0:
            self._changed.wait(left_s)
            yield

    def _lost(self) -> RackGone:
        if self._closed:
            why = "this command let go of it"
        else:
            why = self._reason or "its keeper process died"
        return RackGone(
            f"the rack '{self.name}' is gone: {why}",
            node=self.name,
            hint=f"see {self.run_folder / KEEPER_LOG}",
        )

    def _silent(self, method: str, timeout_s: float) -> HostError:
        return HostError(
            f"the keeper of rack '{self.name}' (pid {self.pid}) did not answer '{method}'"
            f" within {timeout_s:g} s",
            hint=f"see {self.run_folder / KEEPER_LOG}",
        )

    def call(
        self, method: str, *, timeout_s: float = CALL_TIMEOUT_S, **arguments: Any
    ) -> dict[str, Any]:
        """One call of the keeper's protocol.

        :raises RackGone: the keeper is gone.
        :raises LaunchError: a process did not start.
        :raises HostError: it refused, or did not answer in time.
        """
        with self._changed:
            self._call_id += 1
            call_id = self._call_id
            line = json.dumps({"id": call_id, "call": method, **arguments}) + "\n"
            try:
                self._wire.sendall(line.encode())
            except BlockingIOError:
                raise self._silent(method, CALL_TIMEOUT_S) from None
            except OSError:
                self._gone = True
            for _ in self._wait(timeout_s):
                if call_id in self._answers:
                    answer = self._answers.pop(call_id)
                    break
                if self._gone:
                    raise self._lost()
            else:
                raise self._silent(method, timeout_s)
        if "error" in answer:
            raise self._error(answer["error"], arguments)
        result: dict[str, Any] = answer["result"]
        return result

    def _error(self, fields: Mapping[str, Any], arguments: Mapping[str, Any]) -> HostError:
        message = f"rack '{self.name}': {fields['message']}"
        if fields["kind"] != "launch":
            return HostError(message)
        specs = [*arguments.get("processes", ()), arguments.get("process")]
        (spec,) = (spec for spec in specs if spec and spec["name"] == fields["process"])
        return LaunchError(
            message,
            node=fields["process"],
            exit_status=fields["exit_status"],
            command=spec["argv"],
            output=read_tail(Path(spec["log"])),
        )

    # -- calls -----------------------------------------------------------------------------------

    def start_all(
        self,
        processes: Sequence[Mapping[str, Any]],
        memory: Mapping[str, int | str],
        timeout_s: float,
    ) -> None:
        """The owner's first call; see :func:`start_keeper`."""
        self.subscribe()
        self.call("begin", timeout_s=timeout_s, memory=memory, processes=processes)

    def subscribe(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Be told of every exit from now on, and learn of those before."""
        self.call("subscribe", timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """What the keeper knows: see `status` in :mod:`testbed.machine.keeper`."""
        return self.call("status")

    def start(self, command: Command) -> None:
        """Start a process again after its end, or one more; memory of known names is kept.

        :raises LaunchError: it could not be executed, or was not ready in time.
        """
        make_node_folder(self.folder, command, self.run_folder)
        process = process_value(self.folder, command, self.run_folder)
        timeout_s = START_TIMEOUT_S + process["ready_timeout_s"]
        self.call("start", timeout_s=timeout_s, process=process)

    def stop(self, name: str) -> None:
        """SIGTERM: QEMU quits without asking the guest."""
        self.call("stop", name=name)

    def kill(self, name: str) -> None:
        """SIGKILL to the process and whatever it started."""
        self.call("kill", name=name)

    def exit_of(self, name: str) -> Exit | None:
        """How the process ended, or None while it runs.

        :raises RackGone: the keeper is gone, and the process with it.
        """
        with self._changed:
            if name in self._exits:
                return self._exits[name]
            if self._gone:
                raise self._lost()
            return None

    def wait_exit(self, name: str, timeout_s: float) -> Exit | None:
        """Like :meth:`exit_of`, but None only after ``timeout_s``."""
        with self._changed:
            for _ in self._wait(timeout_s):
                if ended := self.exit_of(name):
                    return ended
            return None

    def open_memory(self, name: str) -> mmap.mmap:
        """The shared memory ``NODE/FUNCTION`` (a GPU's VRAM), read and write; close it after use.

        It is the very memory the guest sees, reached through the keeper's descriptor table
        (proc_pid_fd(5)), so it can witness what a DMA really wrote.

        :raises HostError: there is no memory of that name.
        """
        place = self.call("memory", name=name)
        path = f"/proc/{self.pid}/fd/{place['fd']}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"cannot open {name} as {path}: {error.strerror}") from error
        try:
            return mmap.mmap(fd, place["size_bytes"])
        finally:
            os.close(fd)

    def detach(self) -> None:
        """Let the rack outlive this process."""
        self.call("detach")
        self._owner = False

    # -- the end ---------------------------------------------------------------------------------

    def shutdown(self, timeout_s: float = END_TIMEOUT_S) -> None:
        """End the rack: everything is killed, the runtime folder removed. Safe to call twice.

        :raises HostError: the keeper is still there after ``timeout_s`` and SIGKILL.
        """
        with contextlib.suppress(OSError):
            self._wire.sendall(b'{"id": 0, "call": "shutdown"}\n')
        self._await_end(timeout_s)

    def close(self) -> None:
        """Let go; if this process owns the rack and did not detach it, that ends the rack."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            # Only our way out: the keeper sees the end of file, and we still see its own.
            self._wire.shutdown(socket.SHUT_WR if self._owner else socket.SHUT_RDWR)
        try:
            if self._owner:
                self._await_end(END_TIMEOUT_S)
        finally:
            with contextlib.suppress(OSError):
                self._wire.shutdown(socket.SHUT_RDWR)
            self._reader.join()
            self._wire.close()
            self._forget()
            if self._owner:
                clean_folder(self.folder)  # a keeper that was killed could not do it

    def _await_end(self, timeout_s: float) -> None:
        """The end of file means that the folder is gone; a keeper that hangs is killed."""
        with self._changed:
            for _ in self._wait(timeout_s):
                if self._gone:
                    break
            else:
                self._kill_keeper()
        self._reap()

    def _kill_keeper(self) -> None:
        """Returns when the process has ended, and with it its hold on the rack's lock."""
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
            try:
                if not self._gone:  # the connection stands, so the number is still the keeper's
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                ended = poll.poll(CALL_TIMEOUT_S * 1000)
            finally:
                os.close(pidfd)
            if not ended:
                raise HostError(f"rack '{self.name}': its keeper (pid {self.pid}) survived SIGKILL")

    def _reap(self) -> None:
        """See it end: until then it has its hold on the rack's lock."""
        if self._ended >= 0:
            poll = select.poll()
            poll.register(self._ended, select.POLLIN)
            poll.poll(END_TIMEOUT_S * 1000)
            self._forget()

    def _forget(self) -> None:
        """A dead child stays in the process table until its parent has asked for its status."""
        ended, self._ended = self._ended, -1
        if ended >= 0:
            try:
                with contextlib.suppress(ChildProcessError):  # its mother's, not ours
                    os.waitid(os.P_PIDFD, ended, os.WEXITED | os.WNOHANG)
            finally:
                os.close(ended)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
