# SPDX-License-Identifier: Apache-2.0
"""The control socket of a rack node's models: one for all devices, each in a process of its own.

One JSON object a line, as the guest agent's protocol: ``{"id": 1, "method": "counters", "params":
{"device": "gpu0"}}`` is answered by ``{"id": 1, "result": ...}`` or ``{"id": 1, "error": {"type":
..., "message": ...}}``, in order. Methods are those of :class:`testbed.models.control.Control`,
carried out by the named device's process; ``devices`` is answered for all, the lost ones too, and
``routes`` and ``tree`` by the supervisor itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from testbed.models.control import MAX_LINE_BYTES, METHODS

ANSWER_TIMEOUT_S: Final = 10.0


class Refused(Exception):
    """A request that ends in an error: its type and message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Member:
    """One device's process: where it takes requests, and how it ended if it did."""

    pid: int
    calls: socket.socket
    lost: int | None = None  # its exit status
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


Method = Callable[[Mapping[str, Any]], Awaitable[Any]]


class Hub:
    """Serves any number of clients."""

    def __init__(
        self, path: Path, members: Mapping[str, Member], own: Mapping[str, Method] | None = None
    ) -> None:
        """``own`` are further methods, which raise Refused."""
        self._path = path
        self._members = members
        self._own = own or {}
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Listen. OSError if the path is not free."""
        for member in self._members.values():
            member.reader, member.writer = await asyncio.open_connection(
                sock=member.calls, limit=MAX_LINE_BYTES
            )
        self._server = await asyncio.start_unix_server(
            self._connected, self._path, limit=MAX_LINE_BYTES
        )
        self._path.chmod(0o600)

    def close(self) -> None:
        """Hang up and remove the socket."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        for writer in self._clients:
            writer.close()
        for member in self._members.values():
            if member.writer is not None:
                member.writer.close()

    def lose(self, name: str, status: int) -> None:
        """That device's process has ended."""
        self._members[name].lost = status

    async def call(self, name: str, method: str, params: Mapping[str, Any]) -> Any:
        """Have one device's process carry out a method; Refused if it will not or cannot."""
        member = self._members.get(name)
        if member is None:
            raise Refused("InputError", f"no device '{name}'")
        request = {"id": 0, "method": method, "params": params}
        async with member.turn:
            if member.lost is not None or member.reader is None or member.writer is None:
                raise _lost(name, member)
            try:
                member.writer.write(json.dumps(request).encode() + b"\n")
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await member.writer.drain()
                    line = await member.reader.readline()
            except (OSError, ValueError):
                line = b""
            except TimeoutError:
                # What it may answer later would be taken for the next answer: it is given up.
                member.lost = 0
                message = f"device '{name}': no answer within {ANSWER_TIMEOUT_S:g} s"
                raise Refused("TimeoutError", message) from None
            if not line:
                raise _lost(name, member)
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"]["type"], answer["error"]["message"])
        return answer["result"]

    async def devices(self) -> list[dict[str, Any]]:
        """Every device, with ``pid`` and, if its process has ended, ``lost``: the exit status."""
        found: list[dict[str, Any]] = []
        for name, member in self._members.items():
            try:
                (entry,) = await self.call(name, "devices", {"device": name})
            except Refused:
                entry = {"device": name, "connected": False, "failure": None}
            found.append({**entry, "pid": member.pid, "lost": member.lost})
        return found

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            while line := await reader.readline():
                writer.write(await self._answer(line))
                await writer.drain()
        except ValueError:
            sys.stderr.write("control: a line is too long\n")
        except OSError:
            pass
        finally:
            self._clients.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, line: bytes) -> bytes:
        number: object = None
        try:
            request = json.loads(line)
            if not isinstance(request, Mapping):
                raise Refused("InputError", "a request is an object")
            number = request.get("id")
            params = request.get("params", {})
            if not isinstance(params, Mapping):
                raise Refused("InputError", "'params' is an object")
            answer = {"id": number, "result": await self._do(str(request.get("method")), params)}
        except Refused as error:
            answer = {"id": number, "error": {"type": error.kind, "message": str(error)}}
        except (ValueError, RecursionError) as error:
            answer = {"id": number, "error": {"type": "InputError", "message": str(error)}}
        return json.dumps(answer).encode() + b"\n"

    async def _do(self, method: str, params: Mapping[str, Any]) -> Any:
        if method == "devices":
            return await self.devices()
        if method in self._own:
            return await self._own[method](params)
        if method not in METHODS:
            raise Refused("InputError", f"no method '{method}'")
        return await self.call(self.named(params), method, params)

    def named(self, params: Mapping[str, Any]) -> str:
        """The device that a request names; Refused if there is none."""
        name = params.get("device")
        if not isinstance(name, str):
            raise Refused("InputError", "'device' is missing or no str")
        if name not in self._members:
            raise Refused("InputError", f"no device '{name}'")
        return name


def _lost(name: str, member: Member) -> Refused:
    how = f" (status {member.lost})" if member.lost is not None else ""
    return Refused("DeviceLost", f"device '{name}' is lost: its model died{how}")
