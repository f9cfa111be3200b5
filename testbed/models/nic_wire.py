# SPDX-License-Identifier: Apache-2.0
"""The network between NIC models: reads and writes of a peer's memory regions, over unix sockets.

Each NIC listens on a socket of its own and connects to a peer's when it first has something for it.
A request is a header, with data for a write; the answer is a header, with data for a read. The peer
carries it out with its own DMA, behind its own IOMMU, by the rights of the key that the request
names. Requests of one NIC to one peer go one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path as FilePath
from struct import Struct
from typing import Final, NamedTuple

from testbed.models.access import AccessError, Cause, Space, Window
from testbed.models.witness import Path

FRAME_BYTES: Final = 256 << 10
TIMEOUT_S: Final = 20.0  # a peer may have to wait for its driver to repair a page fault
_FRAME: Final = Struct("<BBHIQI")
_WRITE, _READ, _ANSWER = 1, 2, 3


class Frame(NamedTuple):
    """``status`` is a :class:`Cause` or 0; ``size_bytes`` what is read, or what follows."""

    kind: int
    status: int
    sender: int
    key: int
    address: int
    size_bytes: int


class RemoteAccess(NamedTuple):
    """What a peer wants: to write ``data``, or, if it is None, to read."""

    key: int
    address: int
    size_bytes: int
    data: bytes | None


Serve = Callable[[RemoteAccess], Awaitable[bytes]]


async def _receive(reader: asyncio.StreamReader) -> tuple[Frame, bytes]:
    """One frame. IncompleteReadError at the end, ValueError if it is none."""
    frame = Frame(*_FRAME.unpack(await reader.readexactly(_FRAME.size)))
    if frame.size_bytes > FRAME_BYTES:
        raise ValueError(f"a frame of {frame.size_bytes} bytes")
    follows = frame.kind == _WRITE or (frame.kind == _ANSWER and not frame.status)
    return frame, await reader.readexactly(frame.size_bytes) if follows else b""


class WirePort:
    """One NIC's end of the network."""

    def __init__(self, address: int, socket: FilePath, peers: dict[int, FilePath]) -> None:
        self.address = address
        self._path = socket
        self._peers = peers
        self._serve: Serve | None = None
        self._server: asyncio.Server | None = None
        self._incoming: set[asyncio.StreamWriter] = set()
        self._outgoing: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
        self._turns: dict[int, asyncio.Lock] = {}

    async def open(self, serve: Serve) -> None:
        """Listen; ``serve`` carries out what peers want, AccessError is its refusal."""
        self._serve = serve
        self._server = await asyncio.start_unix_server(self._connected, self._path)

    def close(self) -> None:
        """Hang up."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        for writer in self._incoming:
            writer.close()
        for _, writer in self._outgoing.values():
            writer.close()
        self._outgoing.clear()

    def knows(self, peer: int) -> bool:
        """Whether there is such a peer."""
        return peer in self._peers

    async def request(self, peer: int, access: RemoteAccess) -> bytes:
        """Have a peer carry out an access; its data for a read. AccessError if it refuses, does not
        answer in time, or is gone.
        """
        write = access.data is not None
        async with self._turns.setdefault(peer, asyncio.Lock()):
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    frame, data = await self._exchange(peer, access)
            except TimeoutError:
                self._drop(peer)
                raise AccessError(Cause.TIMEOUT, access.address, write=write) from None
            except (OSError, EOFError, ValueError):
                self._drop(peer)
                raise AccessError(Cause.LINK_DOWN, access.address, write=write) from None
            except asyncio.CancelledError:
                self._drop(peer)  # the answer is still to come: it must not meet the next request
                raise
        if frame.status or len(data) != (0 if write else access.size_bytes):
            cause = Cause(frame.status) if frame.status in list(Cause) else Cause.LINK_REFUSED
            raise AccessError(cause, access.address, write=write)
        return data

    async def _exchange(self, peer: int, access: RemoteAccess) -> tuple[Frame, bytes]:
        if peer not in self._outgoing:
            self._outgoing[peer] = await asyncio.open_unix_connection(self._peers[peer])
        reader, writer = self._outgoing[peer]
        kind = _READ if access.data is None else _WRITE
        writer.write(
            _FRAME.pack(kind, 0, self.address, access.key, access.address, access.size_bytes)
        )
        writer.write(access.data or b"")
        await writer.drain()
        frame, data = await _receive(reader)
        if frame.kind != _ANSWER:
            raise ValueError("no answer")
        return frame, data

    def _drop(self, peer: int) -> None:
        connection = self._outgoing.pop(peer, None)
        if connection is not None:
            connection[1].close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._incoming.add(writer)
        try:
            while self._serve is not None:
                frame, data = await _receive(reader)
                if frame.kind not in (_WRITE, _READ):
                    raise ValueError(f"a request of kind {frame.kind}")
                # Not writelines(): from Python 3.12 on it never gets rid of an empty part.
                for part in await self._answer(frame, data, self._serve):
                    writer.write(part)
                await writer.drain()
        except (OSError, EOFError):
            pass
        except ValueError as error:
            sys.stderr.write(f"network port {self.address}: {error}\n")
        finally:
            self._incoming.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, frame: Frame, data: bytes, serve: Serve) -> tuple[bytes, bytes]:
        wanted = data if frame.kind == _WRITE else None
        status = 0
        try:
            data = await serve(RemoteAccess(frame.key, frame.address, frame.size_bytes, wanted))
        except AccessError as error:
            status, data = error.cause, b""
        head = _FRAME.pack(_ANSWER, status, self.address, frame.key, frame.address, len(data))
        return head, data


class RemoteSpace(Space):
    """A peer's memory region, as a space: everything goes by request."""

    path = Path.NETWORK

    def __init__(self, port: WirePort, peer: int, key: int) -> None:
        self._port = port
        self._peer = peer
        self._key = key

    def reach(self, address: int, size_bytes: int, *, write: bool) -> Window:
        """See :meth:`Space.reach`; the peer is asked by :meth:`fetch` and :meth:`store`."""
        del write
        size = min(size_bytes, FRAME_BYTES)
        return Window(size, None, Path.NETWORK, f"nic {self._peer}", self, address)

    async def fetch(self, address: int, size_bytes: int) -> bytes:
        """Read from the peer."""
        wanted = RemoteAccess(self._key, address, size_bytes, None)
        return await self._port.request(self._peer, wanted)

    async def store(self, address: int, data: bytes) -> None:
        """Write to the peer, and wait until it has."""
        await self._port.request(self._peer, RemoteAccess(self._key, address, len(data), data))
