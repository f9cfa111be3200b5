# SPDX-License-Identifier: Apache-2.0
"""Serves a rack's ``ivshmem-doorbell`` devices (QEMU docs/specs/ivshmem-spec.rst).

A client is told, in messages of eight bytes of which some carry a file descriptor: the protocol's
version, its own number, the shared memory, of each other client its number once for each vector
with that vector's eventfd, and at last its own.

A client's number is that of its socket, and so are its eventfds: all are there from the start and
outlive their machine. So a machine is told of the others once, whoever of them runs, and a machine
that starts anew is rung by what the others have already; what was rung meanwhile is forgotten.
QEMU's own server counts connections instead, and announces who comes and goes. That must never be
done here: QEMU 11.1.2 crashes when a number that left comes back (measured; ``resize_peers`` alone
allocates what ``close_peer_eventfds`` frees).

The machines ring one another without the server: it can die, and only who starts later is not
joined. Run by the keeper, standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import sys
from pathlib import Path
from typing import Any

VERSION = 0
THE_MEMORY = -1  # the number of the message that carries it


class BellServer:
    """The event loop: who comes, and who goes.

    :param sockets: where each bell's machine connects; the place in the list is its number.
    """

    def __init__(self, sockets: list[str], vectors: int, memory_bytes: int) -> None:
        self._memory = os.memfd_create("bells", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, memory_bytes)
        self._eventfds = [
            [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(vectors)]
            for _ in sockets
        ]
        self.clients: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._listeners: list[socket.socket] = []
        for number, path in enumerate(sockets):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(path)
            listener.listen(1)
            listener.setblocking(False)
            self._listeners.append(listener)
            self._selector.register(listener, selectors.EVENT_READ, number)

    def serve_once(self, timeout_s: float | None = None) -> None:
        """Handle what there is, or wait for it."""
        for key, _ in self._selector.select(timeout_s):
            number: int = key.data
            if key.fileobj is self._listeners[number]:
                self._come(number)
            elif key.fileobj is self.clients.get(number) and _has_ended(self.clients[number]):
                self._leave(number)

    def _come(self, number: int) -> None:
        try:
            wire, _ = self._listeners[number].accept()
        except OSError:
            return  # it went away again
        if number in self.clients:
            self._leave(number)  # its machine was started anew, and the old one's end is to be read
        for eventfd in self._eventfds[number]:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(eventfd)  # rung while nobody was there
        wire.setblocking(False)  # it takes all of that at once, or it is no QEMU
        try:
            self._introduce(number, wire)
        except OSError:
            wire.close()
            return
        self.clients[number] = wire
        self._selector.register(wire, selectors.EVENT_READ, number)

    def _introduce(self, number: int, wire: socket.socket) -> None:
        wire.sendall(_message(VERSION))
        wire.sendall(_message(number))
        socket.send_fds(wire, [_message(THE_MEMORY)], [self._memory])
        others = [other for other in range(len(self._eventfds)) if other != number]
        for each in (*others, number):
            for eventfd in self._eventfds[each]:
                socket.send_fds(wire, [_message(each)], [eventfd])

    def _leave(self, number: int) -> None:
        wire = self.clients.pop(number)
        self._selector.unregister(wire)
        wire.close()

    def close(self) -> None:
        """End all connections; machines that have eventfds keep them."""
        for wire in (*self.clients.values(), *self._listeners):
            wire.close()
        self.clients.clear()
        self._selector.close()
        for eventfd in (self._memory, *(each for bell in self._eventfds for each in bell)):
            os.close(eventfd)


def _message(number: int) -> bytes:
    return struct.pack("<q", number)


def _has_ended(wire: socket.socket) -> bool:
    """Nothing but its end comes from a client; what else does is not read by anyone."""
    try:
        return not wire.recv(4096)
    except BlockingIOError:
        return False
    except OSError:
        return True


def main(words: str) -> int:
    """Serve until killed; ``words`` is JSON: ``{sockets, vectors, memory_bytes, ready}``."""
    what: dict[str, Any] = json.loads(words)
    server = BellServer(what["sockets"], what["vectors"], what["memory_bytes"])
    Path(what["ready"]).touch()
    sys.stderr.write(f"{len(what['sockets'])} bells\n")
    while True:
        server.serve_once()
