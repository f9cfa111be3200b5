# SPDX-License-Identifier: Apache-2.0
"""QEMU's control socket, as plain blocking calls over the qemu.qmp library.

The library is asyncio; one background thread runs one event loop for all connections of this
process, from the first connection to the interpreter's end. Every wait has a deadline and ends at
once when the connection closes, with :class:`LinkLost`; what QEMU refuses is :class:`QmpError`.
A :class:`Qmp` may be used by several threads. Protocol: QEMU docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    Runstate,
    StateError,
)

from testbed.errors import LinkLost, QmpError
from testbed.machine.sockets import connect_unix
from testbed.machine.transcript import Transcript

CONNECT_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
RETRY_PAUSE_S = 0.02

MAX_EVENTS = 4096  # that one subscriber did not fetch; the oldest go first

T = TypeVar("T")

# The library logs what it raises as well; without a handler Python would print that on stderr.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Event:
    """One event of QEMU's, and when it happened by QEMU's clock."""

    name: str
    data: Mapping[str, Any]
    time_s: float


class _Loop:
    """The event loop that all connections share, in a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.connections: set[Qmp] = set()

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, name="qmp", daemon=True)
                self._thread.start()
                atexit.register(self.stop)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """What the coroutine returns or raises; TimeoutError, and its end, if it is late."""

        async def bounded() -> T:
            async with asyncio.timeout(timeout_s):
                return await work

        future = self._submit(bounded())
        try:
            return future.result(timeout_s + CLOSE_TIMEOUT_S)
        finally:
            future.cancel()  # of use after Ctrl-C

    def _run(self) -> None:
        assert self._loop is not None  # noqa: S101 (for the type checker)
        self._loop.run_forever()
        self._loop.run_until_complete(self._cancel_all())
        self._loop.close()

    @staticmethod
    async def _cancel_all() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        """Close what is still connected and end the thread."""
        for connection in list(self.connections):
            connection.close()
        with self._lock:
            if self._loop is not None and self._thread is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(CLOSE_TIMEOUT_S)
                self._loop = self._thread = None
                atexit.unregister(self.stop)


_loop = _Loop()


class _Client(QMPClient):
    """The library's client, with our ears at its documented hooks."""

    def __init__(self, hear: Callable[[str, Message], None]) -> None:
        super().__init__()
        self._hear = hear
        # The default listener keeps all events for ever; ours are elsewhere.
        self.events.event_filter = lambda _event: False

    def _cb_outbound(self, msg: Message) -> Message:
        self._hear(">", msg)
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        self._hear("<", msg)
        return msg


class Listener:
    """Events of some names since :meth:`Qmp.listen` was entered."""

    def __init__(self, names: frozenset[str], qmp: Qmp) -> None:
        self.names = names
        self.events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._qmp = qmp

    def get(self, timeout_s: float, *, match: Callable[[Event], bool] | None = None) -> Event:
        """The next event (that matches; others are dropped).

        :raises LinkLost: none came within ``timeout_s``, or the connection closed.
        """
        return self._qmp.await_event(self, timeout_s, match)

    def drain(self) -> list[Event]:
        """What has come so far, without waiting."""
        return self._qmp.drain(self)


class Qmp:
    """One connection to one QEMU; make it with :meth:`connect`, end it with :meth:`close`."""

    def __init__(self, node: str, transcript: Path | None = None) -> None:
        self.node = node
        self.version = ""  # QEMU's, for example "11.1.2"
        self._transcript = Transcript(transcript) if transcript else None
        self._client = _Client(self._hear)
        self._wire: socket.socket | None = None
        self._supervisor: asyncio.Task[None] | None = None  # the loop itself would not keep it
        self._changed = threading.Condition()
        self._listeners: list[Listener] = []
        self._closed = ""  # why, once it is so

    @classmethod
    def connect(
        cls,
        path: Path,
        *,
        node: str,
        timeout_s: float = CONNECT_TIMEOUT_S,
        check: Callable[[], None] = lambda: None,
        transcript: Path | None = None,
    ) -> Qmp:
        """Connect to the socket at ``path`` and shake hands, waiting until QEMU has made it.

        ``check``       is called between attempts; it raises if there is no use in waiting.
        ``transcript``  gets every message as a JSON line.

        :raises LinkLost: no QMP there within ``timeout_s``.
        """
        deadline_s = time.monotonic() + timeout_s
        last = "no attempt was made"
        while (left_s := deadline_s - time.monotonic()) > 0:
            qmp = cls(node, transcript)
            try:
                qmp._open(path, left_s)
                return qmp
            except TimeoutError:
                last = "no handshake; does another client hold it?"
            except (OSError, ConnectError) as error:
                last = str(error)
            finally:
                if qmp._wire is None and qmp._transcript:
                    qmp._transcript.close()
            check()
            time.sleep(RETRY_PAUSE_S)
        raise LinkLost(
            f"{node}: QEMU's control socket did not answer within {timeout_s:g} s ({last})",
            node=node,
        )

    def _open(self, path: Path, timeout_s: float) -> None:
        wire = connect_unix(path, timeout_s)
        wire.setblocking(False)
        _loop.run(self._establish(wire), timeout_s)
        self._wire = wire
        _loop.connections.add(self)
        greeting = self._client.greeting
        if greeting is not None:
            parts: Any = greeting.QMP.version.get("qemu", {})
            self.version = ".".join(str(parts.get(key, "?")) for key in ("major", "minor", "micro"))

    async def _establish(self, wire: socket.socket) -> None:
        try:
            await self._client.connect(wire)
        except AssertionError:
            # The library's: the connection ended in the moment in which it stood.
            with contextlib.suppress(Exception):
                await self._client.disconnect()
            raise ConnectionResetError("QEMU closed it after the handshake") from None
        except BaseException:
            wire.close()
            raise
        self._supervisor = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        """Await the connection's end, of whichever side, and tell everyone who waits."""
        why = "the testbed ended it"
        try:
            while self._client.runstate == Runstate.RUNNING:
                await self._client.runstate_changed()
            await self._client.disconnect()
        except EOFError:
            why = "QEMU closed it"
        except Exception as error:  # the library: "arbitrary"
            why = str(error) or type(error).__name__
        finally:
            with self._changed:
                self._closed = why
                self._changed.notify_all()

    def _hear(self, direction: str, message: Message) -> None:
        """In the loop's thread: every message that goes out or comes in."""
        if self._transcript:
            self._transcript.write(direction, dict(message))
        if direction == "<" and "event" in message:
            stamp: Any = message.get("timestamp", {})
            data: Any = message.get("data", {})
            time_s = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
            event = Event(str(message["event"]), data, time_s)
            with self._changed:
                for listener in self._listeners:
                    if not listener.names or event.name in listener.names:
                        listener.events.append(event)
                self._changed.notify_all()

    def _lost(self, what: str) -> LinkLost:
        return LinkLost(f"{self.node}: {what}", node=self.node)

    # -- commands --------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """The connection has ended."""
        return bool(self._closed)

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Any:
        """One command; returns what QEMU returns.

        :raises QmpError: QEMU refused it.
        :raises LinkLost: the connection closed, or no answer within ``timeout_s``.
        """
        try:
            return _loop.run(self._client.execute(command, arguments), timeout_s)
        except ExecuteError as error:
            raise QmpError(
                f"{self.node}: QEMU refused {command}: {error.error.error.desc}",
                error_class=error.error_class,
                description=error.error.error.desc,
            ) from error
        except TimeoutError:
            raise self._lost(f"QEMU did not answer {command} within {timeout_s:g} s") from None
        except (ExecInterruptedError, StateError):
            self.wait_closed(CLOSE_TIMEOUT_S)  # for the reason
            raise self._lost(
                f"the connection to QEMU closed during {command} ({self._closed})"
            ) from None

    def device_add(self, properties: Mapping[str, Any]) -> None:
        """Plug a device in: ``{"driver": ..., "id": ..., "bus": ...}``."""
        self.execute("device_add", properties)

    def device_del(self, device_id: str, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Pull a device out and wait until the guest has let it go.

        :raises QmpError: no such device, or the guest refused.
        :raises LinkLost: the guest did not let it go within ``timeout_s``.
        """
        with self.listen("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR") as listener:
            self.execute("device_del", {"id": device_id}, timeout_s=timeout_s)
            event = listener.get(timeout_s, match=lambda e: e.data.get("device") == device_id)
        if event.name != "DEVICE_DELETED":
            refusal = f"the guest refused to let {device_id} go"
            raise QmpError(
                f"{self.node}: {refusal}", error_class="GenericError", description=refusal
            )

    # -- events ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def listen(self, *names: str) -> Iterator[Listener]:
        """Collect events of these names (all, if none is given) while the context lasts."""
        listener = Listener(frozenset(names), self)
        with self._changed:
            self._listeners.append(listener)
        try:
            yield listener
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def await_event(
        self, listener: Listener, timeout_s: float, match: Callable[[Event], bool] | None
    ) -> Event:
        """See :meth:`Listener.get`."""
        deadline_s = time.monotonic() + timeout_s
        wanted = " or ".join(sorted(listener.names)) or "event"
        with self._changed:
            while True:
                while listener.events:
                    event = listener.events.popleft()
                    if match is None or match(event):
                        return event
                if self._closed:
                    raise self._lost(f"no {wanted}: the connection closed ({self._closed})")
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise self._lost(f"no {wanted} within {timeout_s:g} s")
                self._changed.wait(left_s)

    def drain(self, listener: Listener) -> list[Event]:
        """See :meth:`Listener.drain`."""
        with self._changed:
            events = list(listener.events)
            listener.events.clear()
        return events

    # -- the end ---------------------------------------------------------------------------------

    def wait_closed(self, timeout_s: float) -> bool:
        """Wait for the connection's end (after `quit`, say); false if it still stands."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._closed), timeout_s)

    def close(self) -> None:
        """End the connection; QEMU goes on. Safe to call twice."""
        if self._wire is not None:
            # The library takes it for the end of the stream and cleans up; nothing can hang.
            with contextlib.suppress(OSError):
                self._wire.shutdown(socket.SHUT_RDWR)
            self.wait_closed(CLOSE_TIMEOUT_S)
            self._wire = None
            _loop.connections.discard(self)
        if self._transcript:
            self._transcript.close()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
