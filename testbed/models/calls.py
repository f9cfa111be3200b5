# SPDX-License-Identifier: Apache-2.0
"""Questions that a device's process asks its supervisor, over a stream of one JSON object a line.

The other direction, from the supervisor to the device, is :mod:`testbed.models.hub`'s. Neither end
ever waits for the other while it holds something up: questions are answered in any order, each as a
task of its own, and both ends go on serving their machine meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

MAX_LINE_BYTES: Final = 16 << 20


class CallFailed(Exception):
    """The supervisor refuses, or is gone."""


class Caller:
    """The device's end."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._next = 0

    async def open(self) -> None:
        """From now on there can be calls."""
        self._reader, self._writer = await asyncio.open_connection(
            sock=self._stream, limit=MAX_LINE_BYTES
        )

    async def serve(self) -> None:
        """Take the answers, until the stream ends. To be run once it is open."""
        if self._reader is None or self._writer is None:
            raise CallFailed("not open")
        try:
            while line := await self._reader.readline():
                answer = json.loads(line)
                future = self._pending.get(answer["id"])
                if future is None or future.done():
                    continue
                if "error" in answer:
                    future.set_exception(CallFailed(answer["error"]))
                else:
                    future.set_result(answer["result"])
        except OSError:
            pass
        finally:
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(CallFailed("the supervisor is gone"))
            self._writer.close()

    async def call(self, method: str, params: Mapping[str, Any], *, timeout_s: float) -> Any:
        """The answer; CallFailed if there is none within ``timeout_s``."""
        if self._writer is None or self._writer.is_closing():
            raise CallFailed("the supervisor is gone")
        number = self._next
        self._next += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        request = {"id": number, "method": method, "params": params}
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(json.dumps(request).encode() + b"\n")
                await self._writer.drain()
                return await future
        except TimeoutError:
            raise CallFailed(f"no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise CallFailed(str(error)) from error
        finally:
            self._pending.pop(number, None)


Answer = Callable[[str, Mapping[str, Any]], Awaitable[Any]]


async def answer_calls(stream: socket.socket, answer: Answer) -> None:
    """The supervisor's end, until the stream ends. ``answer`` raises CallFailed to refuse."""
    reader, writer = await asyncio.open_connection(sock=stream, limit=MAX_LINE_BYTES)
    tasks: set[asyncio.Task[None]] = set()

    async def one(line: bytes) -> None:
        request = json.loads(line)
        try:
            reply = {"result": await answer(request["method"], request["params"])}
        except CallFailed as error:
            reply = {"error": str(error)}
        writer.write(json.dumps({"id": request["id"], **reply}).encode() + b"\n")

    try:
        while line := await reader.readline():
            task = asyncio.get_running_loop().create_task(one(line))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    except (OSError, ValueError):  # the device's process is gone
        pass
    finally:
        for task in tasks:
            task.cancel()
        writer.close()
