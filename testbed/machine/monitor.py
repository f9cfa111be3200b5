# SPDX-License-Identifier: Apache-2.0
"""QEMU's control socket for code that runs in an event loop and has only the standard library.

The device models' helper asks the machine about its PCI tree while it serves that same machine: it
may never block, and it starts without site-packages. Suites and users have
:mod:`testbed.machine.qmp`. Protocol: QEMU docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

MAX_LINE_BYTES: Final = 16 << 20
MAX_PENDING: Final = 6  # QEMU stops reading at eight (monitor/qmp.c)


class MonitorLost(Exception):
    """QEMU is gone, did not answer in time, or spoke no QMP."""


class MonitorRefused(Exception):
    """QEMU refused a command."""


class Monitor:
    """One connection. Made by :meth:`connect`; ended by :meth:`close`, or by QEMU's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._slots = asyncio.Semaphore(MAX_PENDING)
        self._next = 0
        self._listener: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float) -> Monitor:
        """Connect and negotiate. MonitorLost if nobody answers there within ``timeout_s``."""
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE_BYTES)
                if b'"QMP"' not in await reader.readline():
                    raise ValueError("no greeting")
                monitor = cls(reader, writer)
                monitor._listener = asyncio.get_running_loop().create_task(monitor._listen())
                await monitor.execute("qmp_capabilities", timeout_s=timeout_s)
                return monitor
        except (OSError, ValueError, MonitorRefused) as error:  # TimeoutError is an OSError
            if writer is not None:
                writer.close()
            raise MonitorLost(f"{path}: {error or type(error).__name__}") from error

    @property
    def is_open(self) -> bool:
        """Commands may be sent."""
        return self._listener is not None and not self._listener.done()

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> Any:
        """What QEMU returns.

        :raises MonitorRefused: QEMU's error. :raises MonitorLost: the end, or ``timeout_s`` passed.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        number = self._next
        self._next += 1
        request = {"execute": command, "arguments": arguments or {}, "id": number}
        try:
            async with asyncio.timeout(timeout_s), self._slots:
                if not self.is_open:
                    raise MonitorLost(f"{command}: the connection has ended")
                self._pending[number] = future
                self._writer.write(json.dumps(request).encode() + b"\n")
                await self._writer.drain()
                return await future
        except TimeoutError:
            raise MonitorLost(f"{command}: no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise MonitorLost(f"{command}: {error}") from error
        finally:
            self._pending.pop(number, None)

    def close(self) -> None:
        """End the connection; whoever waits gets MonitorLost."""
        if self._listener is not None:
            self._listener.cancel()
        self._writer.close()

    async def _listen(self) -> None:
        why = "the connection has ended"
        try:
            while line := await self._reader.readline():
                self._take(json.loads(line))
        except (OSError, ValueError) as error:
            why = str(error)
        finally:
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(MonitorLost(why))
            with contextlib.suppress(RuntimeError):  # the loop is closing
                self._writer.close()

    def _take(self, message: Mapping[str, Any]) -> None:
        future = self._pending.get(message.get("id", -1))
        if future is None or future.done():
            return  # an event, or the answer to someone who no longer waits
        if "error" in message:
            future.set_exception(MonitorRefused(str(message["error"].get("desc"))))
        else:
            future.set_result(message["return"])
