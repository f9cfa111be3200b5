# SPDX-License-Identifier: Apache-2.0
"""The agent's client: one JSON line a call over one persistent channel.

Whatever can go wrong has a name: the agent refused or failed (:class:`AgentError`, the machine is
fine), or the machine, the channel or the protocol broke (:class:`LinkLost`, and the node's owner
adds what the console and QEMU say about why).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from testbed.errors import AgentError, LinkLost

PROTOCOL_VERSION = 1
MAX_LINE_BYTES = 64 << 20
HELLO_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 30.0


class Pipe(Protocol):
    """A byte stream both ways; paramiko's channel is one, a test's socket another."""

    def recv(self, nbytes: int, /) -> bytes:
        """Some bytes, or none at the end of the stream."""

    def sendall(self, data: bytes, /) -> None:
        """All of it, or an OSError."""

    def settimeout(self, timeout: float | None, /) -> None:
        """Bounds the two above, which then raise TimeoutError."""

    def close(self) -> None:
        """End both ways."""


class AgentClient:
    """Calls methods of the agent at the other end of ``pipe``.

    :param node: the node's name, for messages.
    :param blame: turns a broken link into the error that the user sees; the node's owner knows
        the console and QEMU's exit status, this class does not.
    :param record: is given every call as a value, for the run's observations.
    """

    def __init__(
        self,
        node: str,
        pipe: Pipe,
        *,
        blame: Callable[[LinkLost], BaseException] = lambda error: error,
        record: Callable[[Mapping[str, Any]], None] | None = None,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
    ) -> None:
        self.node = node
        self._pipe = pipe
        self._blame = blame
        self._record = record
        self._buffer = bytearray()
        self._next_id = 0
        self._broken = ""
        self._lock = threading.Lock()
        self.hello: Mapping[str, Any] = self._read_hello(hello_timeout_s)

    def _read_hello(self, timeout_s: float) -> Mapping[str, Any]:
        first = self._read_message(time.monotonic() + timeout_s, "its hello")
        hello = first.get("hello")
        if not isinstance(hello, dict):
            raise self._lost(f"the agent began with {_short(first)} instead of its hello")
        if hello.get("protocol") != PROTOCOL_VERSION:
            raise self._lost(
                f"the agent speaks protocol {hello.get('protocol')!r}, not {PROTOCOL_VERSION}"
            )
        return hello

    def call(self, method: str, timeout_s: float = CALL_TIMEOUT_S, /, **params: Any) -> Any:
        """Call ``method`` and return its result.

        Both are positional only, because methods have parameters of these names (``irq.wait``).

        :raises AgentError: the agent answered with an error; it goes on.
        :raises LostError: the machine or the link died, or no answer came within ``timeout_s``;
            every later call fails at once.
        """
        with self._lock:
            if self._broken:
                raise self._lost(self._broken)
            self._next_id += 1
            request = {"id": self._next_id, "method": method, "params": params}
            started = time.monotonic()
            self._send(request, started + timeout_s)
            reply = self._read_message(started + timeout_s, f"the answer to {method}")
            if reply.get("id") != self._next_id:
                raise self._lost(f"the agent answered {_short(reply)} to call {self._next_id}")
        elapsed_s = time.monotonic() - started
        error = reply.get("error")
        if self._record is not None:
            self._record(
                {
                    "node": self.node,
                    "method": method,
                    "params": params,
                    "at_s": round(time.time() - elapsed_s, 3),  # since 1970, as outcomes have it
                    "elapsed_s": round(elapsed_s, 6),
                    **({"error": error} if error is not None else {"result": reply.get("result")}),
                }
            )
        if error is not None:
            raise _agent_error(error)
        return reply.get("result")

    def _send(self, request: Mapping[str, Any], deadline: float) -> None:
        line = json.dumps(request, separators=(",", ":")).encode() + b"\n"
        try:
            self._pipe.settimeout(max(0.001, deadline - time.monotonic()))
            self._pipe.sendall(line)
        except TimeoutError:
            raise self._lost(f"{request['method']} could not be sent in time") from None
        except OSError as error:
            raise self._lost(f"the agent's channel is closed ({error})") from error

    def _read_message(self, deadline: float, what: str) -> dict[str, Any]:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > MAX_LINE_BYTES:
                raise self._lost(f"more than {MAX_LINE_BYTES} bytes without a line's end")
            left_s = deadline - time.monotonic()
            try:
                self._pipe.settimeout(max(0.001, left_s))
                chunk = self._pipe.recv(1 << 20) if left_s > 0 else None
            except TimeoutError:
                chunk = None
            except OSError as error:
                raise self._lost(f"the agent's channel broke while waiting for {what}") from error
            if chunk is None:
                raise self._lost(f"{what} did not come in time")
            if not chunk:
                said = bytes(self._buffer[-400:]).decode(errors="replace").strip()
                raise self._lost(
                    f"the agent's channel closed while waiting for {what}"
                    + (f" (it last said: {said})" if said else "")
                )
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise self._lost(f"the guest answered garbage: {_short(line)}")
        return message

    def _lost(self, why: str) -> BaseException:
        self._broken = self._broken or why
        with contextlib.suppress(OSError):
            self._pipe.close()
        return self._blame(LinkLost(f"{self.node}: {why}", node=self.node))

    def close(self) -> None:
        """End the channel; the agent then releases what it holds and ends."""
        self._broken = self._broken or "the client was closed"
        with contextlib.suppress(OSError):
            self._pipe.close()


def _agent_error(error: Any) -> AgentError:
    if not isinstance(error, dict):
        return AgentError(_short(error), remote_type="Unknown")
    number = error.get("errno")
    return AgentError(
        str(error.get("message", "")),
        remote_type=str(error.get("type", "Unknown")),
        errno=number if isinstance(number, int) else None,
        where=str(error.get("where", "")),
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
