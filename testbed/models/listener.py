# SPDX-License-Identifier: Apache-2.0
"""Where a device waits for its machine: one listening socket a device."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from testbed.models.device import Device
from testbed.models.memory import MemoryCache
from testbed.models.progress import Progress
from testbed.models.server import Session


class Listener:
    """A device's socket. A second machine has to wait until the first is gone."""

    def __init__(
        self,
        device: Device,
        path: Path,
        memories: MemoryCache,
        on_change: Callable[[Device, socket.socket | None], None] = lambda _device, _socket: None,
        progress: Progress | None = None,
    ) -> None:
        """``on_change`` is told of each connection, and of its end; ``progress`` of messages."""
        self._progress = progress
        self.device = device
        self.path = path
        self.session: Session | None = None
        self._memories = memories
        self._on_change = on_change
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._listening = False

    def open(self) -> None:
        """Listen; OSError if the path cannot be bound. Needs a running loop."""
        self._socket.bind(str(self.path))
        self._socket.listen(1)
        self._wait()

    def close(self) -> None:
        """End the session, stop listening and remove the socket file."""
        self._ignore()
        self._socket.close()
        self.path.unlink(missing_ok=True)
        if self.session is not None:
            self.session.close("the model is stopped")

    def _wait(self) -> None:
        if not self._listening:
            asyncio.get_running_loop().add_reader(self._socket, self._accept)
            self._listening = True

    def _ignore(self) -> None:
        if self._listening:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._listening = False

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:  # gone again, or no descriptor is left
            return
        self._ignore()
        self._on_change(self.device, connection)
        self.session = Session(
            connection, self.device, self._memories, self._ended, progress=self._progress
        )

    def _ended(self, _session: Session, reason: str) -> None:
        self.session = None
        self._on_change(self.device, None)
        sys.stderr.write(f"device {self.device.name}: machine disconnected: {reason}\n")
        if self._socket.fileno() >= 0:
            self._wait()
