# SPDX-License-Identifier: Apache-2.0
"""Devices that go away while they are used: a driver unbound, I/O meanwhile, memory after it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time

from guest_agent.hw import storage
from guest_agent.hw.binding import Binding
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from guest_agent.hw.region import Region

_POLL_S = 0.01
_STUCK = "a call into the kernel did not come back"


class Loss:
    """Drivers that were unbound, and a stream of I/O, until :meth:`close`."""

    def __init__(self) -> None:
        self._unbound: dict[str, Binding] = {}
        self._stream: Stream | None = None

    def unbind(self, bdf: str, timeout_s: float) -> dict[str, Any]:
        """Take a function from its driver: ``{ended, seconds}``, of the kernel's work.

        The kernel waits in there for whoever uses the device; so it is asked on a thread.
        """
        made: list[Binding] = []
        answer = _bounded(lambda: made.append(Binding(bdf, "")), timeout_s)
        if made:
            self._unbound[bdf] = made[0]
        return answer

    def rebind(self, bdf: str, timeout_s: float) -> dict[str, Any]:
        """Give it back. :raises ParameterError: it was not unbound here."""
        if bdf not in self._unbound:
            raise ParameterError(f"device: {bdf} was not unbound")
        return _bounded(self._unbound.pop(bdf).restore, timeout_s)

    def start(self, device: str, region: Region, size_bytes: int) -> None:
        """Begin a stream of I/O. :raises ParameterError: there is one."""
        if self._stream is not None:
            raise ParameterError("a stream runs already")
        self._stream = Stream(device, region, size_bytes)

    def progress(self) -> int:
        """How many transfers the stream has made. :raises ParameterError: there is none."""
        return self._running().transfers

    def end(self, timeout_s: float) -> dict[str, Any]:
        """How the stream ended, by itself within ``timeout_s`` or stopped then."""
        answer = self._running().end(timeout_s)
        self._stream = None
        return answer

    def close(self) -> None:
        """Stop the stream, and give the functions back."""
        if self._stream is not None:
            self.end(0)
        while self._unbound:
            self._unbound.popitem()[1].restore()

    def _running(self) -> Stream:
        if self._stream is None:
            raise ParameterError("no stream runs")
        return self._stream


class Stream:
    """Direct I/O from a disk into memory, again and again, until it fails or is stopped."""

    def __init__(self, device: str, region: Region, size_bytes: int) -> None:
        self.transfers = 0
        self._error = ""
        self._wanted = True
        self._work = (device, region, 0, size_bytes, 0, False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._wanted and not self._error:
            try:
                self._error = storage.transfer(*self._work)["error"]
            except ParameterError:  # the kernel has let go of the disk
                self._error = "ENODEV"
            except OSError as error:
                self._error = errno.errorcode.get(error.errno or 0, str(error))
            self.transfers += not self._error

    def end(self, timeout_s: float) -> dict[str, Any]:
        """``{transfers, error, by_itself, ended}``; not ended: the kernel keeps it."""
        self._thread.join(timeout_s)
        by_itself = not self._thread.is_alive()
        self._wanted = False
        self._thread.join(_POLL_S if by_itself else max(timeout_s, 1.0))
        return {
            "transfers": self.transfers,
            "error": self._error,
            "by_itself": by_itself,
            "ended": not self._thread.is_alive(),
        }


def touch(region: Region, timeout_s: float) -> dict[str, Any]:
    """Read a byte of mapped memory in a process of its own: ``{signal}`` that ended it, or 0.

    :raises OSError: ETIMEDOUT: it did not end.
    """
    pid = os.fork()
    if not pid:
        # Not the agent's handlers, nor its core file.
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        region.read(0, 1)
        os._exit(0)
    deadline_s = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}
        if time.monotonic() > deadline_s:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise TimeoutError(_STUCK)
        time.sleep(_POLL_S)


def _bounded(work: Callable[[], object], timeout_s: float) -> dict[str, Any]:
    began_s = time.monotonic()
    failures: list[BaseException] = []

    def act() -> None:
        try:
            work()
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failures:
        raise failures[0]
    return {"ended": not thread.is_alive(), "seconds": time.monotonic() - began_s}
