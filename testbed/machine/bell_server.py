# SPDX-License-Identifier: Apache-2.0
"""Serves a rack's ``ivshmem-doorbell`` devices (QEMU docs/specs/ivshmem-spec.rst).

A client is told, in messages of eight bytes of which some carry a file descriptor: the protocol's
version, its own number, the shared memory, of each other client its number once for each vector
with that vector's eventfd, and at last its own. Who is there already is told of it in the same way,
and of its end by its number alone. From then on the machines ring one another without the server:
it can die, and only who starts later is not joined.

A client's number is that of its socket. QEMU's own server counts connections instead, so that
numbers depend on who started first. Run by the keeper, standard library only.
"""

from __future__ import annotations

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


class Client:
    """One machine's bell: its connection, and the eventfds by which it is rung."""

    def __init__(self, wire: socket.socket, vectors: int) -> None:
        # QEMU reads at once; one that does not must not hold up the others.
        wire.setblocking(False)
        self.wire = wire
        self.eventfds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(vectors)]

    def tell(self, number: int, fd: int | None = None) -> None:
        """One message. :raises OSError: it is gone, or reads nothing."""
        message = struct.pack("<q", number)
        if fd is None:
            self.wire.sendall(message)
        else:
            socket.send_fds(self.wire, [message], [fd])

    def tell_of(self, number: int, other: Client) -> None:
        """That ``other`` is there, and how it is rung. :raises OSError: as :meth:`tell`."""
        for eventfd in other.eventfds:
            self.tell(number, eventfd)

    def close(self) -> None:
        """Let go of the connection and the eventfds; machines that have them keep theirs."""
        self.wire.close()
        for eventfd in self.eventfds:
            os.close(eventfd)


class BellServer:
    """The event loop: who comes, and who goes.

    :param sockets: where each bell's machine connects; the place in the list is its number.
    """

    def __init__(self, sockets: list[str], vectors: int, memory_bytes: int) -> None:
        self._vectors = vectors
        self._memory = os.memfd_create("bells", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, memory_bytes)
        self.clients: dict[int, Client] = {}
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
            client = self.clients.get(number)
            if client is not None and key.fileobj is client.wire:
                if _has_ended(client.wire):
                    self._leave(number)
            elif key.fileobj in self._listeners:
                self._come(number, self._listeners[number])

    def _come(self, number: int, listener: socket.socket) -> None:
        try:
            wire, _ = listener.accept()
        except OSError:
            return  # it went away again
        if number in self.clients:
            self._leave(number)  # its machine was started anew, and the old one's end is to be read
        client = Client(wire, self._vectors)
        try:
            client.tell(VERSION)
            client.tell(number)
            client.tell(THE_MEMORY, self._memory)
            for other, there in self.clients.items():
                client.tell_of(other, there)
            client.tell_of(number, client)
        except OSError:
            client.close()
            return
        self.clients[number] = client
        self._selector.register(wire, selectors.EVENT_READ, number)
        self._tell_others(number, client)

    def _leave(self, number: int) -> None:
        client = self.clients.pop(number)
        self._selector.unregister(client.wire)
        client.close()
        self._tell_others(number, None)

    def _tell_others(self, number: int, client: Client | None) -> None:
        """Who came, or, without ``client``, who left; who cannot be told leaves too."""
        for other, there in list(self.clients.items()):
            if other == number or other not in self.clients:
                continue
            try:
                if client is None:
                    there.tell(number)
                else:
                    there.tell_of(number, client)
            except OSError:
                self._leave(other)

    def close(self) -> None:
        """End all connections."""
        for client in self.clients.values():
            client.close()
        for listener in self._listeners:
            listener.close()
        self.clients.clear()
        self._selector.close()
        os.close(self._memory)


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
