# SPDX-License-Identifier: Apache-2.0
"""A stream of vfio-user messages over a unix socket, in an asyncio loop, for either side.

The channel frames, collects the descriptors that come along, sends without blocking, and ends on
anything that is no message. It knows nothing of what the messages mean. Its bounds:

* a message is at most :data:`wire.MAX_MESSAGE_BYTES` long and brings at most
  :data:`wire.MAX_MESSAGE_FDS` descriptors, all of which are closed unless the receiver takes them;
* who does not read its replies is not read from any more (:data:`MAX_UNSENT_BYTES`);
* at most :data:`MESSAGES_A_TURN` messages are handled before other channels have their turn.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import traceback
from collections import deque
from pathlib import PurePath
from typing import Final, Protocol

from testbed.models import wire
from testbed.models.progress import Progress

MESSAGES_A_TURN: Final = 64
MAX_UNSENT_BYTES: Final = 4 << 20
MAX_DRAINED: Final = 4096

_ANCILLARY_BYTES = socket.CMSG_SPACE(wire.MAX_MESSAGE_FDS * array.array("i").itemsize)
_HEADER_BYTES = wire.HEADER.size_bytes
_SMALL_BYTES = 4096  # buffers up to this size are kept between messages


class Receiver(Protocol):
    """Who handles what a channel receives."""

    def message(self, header: wire.Header, payload: memoryview, fds: list[int]) -> None:
        """One message. ``payload`` is valid during the call only. Descriptors that are kept are to
        be removed from ``fds``; the channel closes the rest. :class:`wire.Malformed` ends the
        channel.
        """

    def closed(self, reason: str) -> None:
        """The channel has ended; called once, also after :meth:`Channel.close`."""


class Channel:
    """One connected socket; owns it, and reads as soon as it exists (in a running loop)."""

    def __init__(
        self, connection: socket.socket, receiver: Receiver, progress: Progress | None = None
    ) -> None:
        """``progress`` is told of every message under way."""
        connection.setblocking(False)
        self._progress = progress
        self._socket = connection
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._header = bytearray(_HEADER_BYTES)
        self._small = bytearray(_SMALL_BYTES)
        self._body: memoryview | None = None  # of the message under way
        self._have = 0  # bytes of its header, or of its body
        self._fds: list[int] = []
        self._unsent: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._unsent_bytes = 0
        self._reading = False
        self._open = True
        self._resume()

    @property
    def is_open(self) -> bool:
        """False as soon as either side has ended it."""
        return self._open

    def send(
        self, head: bytes, payload: bytes | memoryview = b"", fds: tuple[int, ...] = ()
    ) -> None:
        """Send one message, with borrowed descriptors; what does not fit is sent later."""
        if not self._open:
            return
        data = memoryview(b"".join((head, payload)))
        held = tuple(os.dup(fd) for fd in fds) if self._unsent else fds
        if not self._unsent:
            sent = self._send_now(data, fds)
            if sent == len(data) or not self._open:
                return
            data = data[sent:]
            held = () if sent else tuple(os.dup(fd) for fd in fds)
            self._loop.add_writer(self._socket, self._writable)
        self._unsent.append((data, held))
        self._unsent_bytes += len(data)
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            self._pause()

    def close(self, reason: str = "closed here") -> None:
        """End the channel and close all that it holds; harmless when it has ended already."""
        if not self._open:
            return
        self._open = False
        self._pause()
        self._loop.remove_writer(self._socket)
        self._close_fds()
        for _, held in self._unsent:
            for fd in held:
                os.close(fd)
        self._unsent.clear()
        self._drain()
        self._socket.close()
        self._receiver.closed(reason)

    def _drain(self) -> None:
        """Take what nobody will read any more out of the socket.

        A unix socket that is closed with unread data resets the other side's, and QEMU 11.1 does
        not survive that: it asserts in error_setv (seen when a model was killed within a copy).
        """
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
            for _ in range(MAX_DRAINED):
                if not self._socket.recv(_SMALL_BYTES):
                    break

    def _pause(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._socket)
            self._reading = False

    def _resume(self) -> None:
        if self._open and not self._reading:
            self._loop.add_reader(self._socket, self._readable)
            self._reading = True

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _send_now(self, data: memoryview, fds: tuple[int, ...]) -> int:
        try:
            if fds:
                return socket.send_fds(self._socket, [data], list(fds))
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self.close(f"send failed: {error.strerror}")
            return 0

    def _writable(self) -> None:
        while self._unsent:
            data, held = self._unsent[0]
            sent = self._send_now(data, held)
            if not self._open or not sent:
                return
            self._unsent_bytes -= sent
            for fd in held:
                os.close(fd)
            if sent < len(data):
                self._unsent[0] = (data[sent:], ())
                return
            self._unsent.popleft()
        self._loop.remove_writer(self._socket)
        self._resume()

    def _readable(self) -> None:
        try:
            for _ in range(MESSAGES_A_TURN):
                if not (self._reading and self._receive_one()):
                    return
        except (BlockingIOError, InterruptedError):
            return
        except wire.Malformed as error:
            self.close(f"protocol error: {error}")
        except OSError as error:
            self.close(f"receive failed: {error.strerror}")
        except Exception as error:  # our own mistake: it costs this connection, not the others
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{PurePath(frame.filename).name}:{frame.lineno}"
            self.close(f"internal error: {type(error).__name__}: {error} at {where}")

    def _receive_one(self) -> bool:
        """Receive what there is of one message and handle it if it is whole; False at the end of
        the stream or if the receiver ended the channel; BlockingIOError if there is no more.
        """
        while self._body is None:
            if not self._receive_header():
                return False
        while self._have < len(self._body):
            # Without room for ancillary data the kernel drops descriptors that come here.
            count = self._socket.recv_into(self._body[self._have :])
            if not count:
                self.close("the other side is gone (within a message)")
                return False
            self._have += count
            if self._progress is not None:
                self._progress.left(len(self._body) - self._have)
        body, self._body, self._have = self._body, None, 0
        fds, self._fds = self._fds, []
        try:
            self._receiver.message(wire.HEADER.decode(self._header), body, fds)
        finally:
            for fd in fds:
                os.close(fd)
        if self._progress is not None:
            self._progress.done()
        return self._open

    def _receive_header(self) -> bool:
        wanted = _HEADER_BYTES - self._have
        data, ancillary, flags, _ = self._socket.recvmsg(
            wanted, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self._fds.extend(numbers)
        if flags & socket.MSG_CTRUNC or len(self._fds) > wire.MAX_MESSAGE_FDS:
            raise wire.Malformed("too many descriptors")
        if not data:
            within = " (within a message)" if self._have else ""
            self.close(f"the other side is gone{within}")
            return False
        self._header[self._have : self._have + len(data)] = data
        self._have += len(data)
        if self._have == _HEADER_BYTES:
            header = wire.HEADER.decode(self._header)
            if not _HEADER_BYTES <= header.size <= wire.MAX_MESSAGE_BYTES:
                raise wire.Malformed(f"a message of {header.size} bytes")
            room = header.size - _HEADER_BYTES
            if self._progress is not None:
                self._progress.begin(header, room)
            whole = self._small if room <= _SMALL_BYTES else bytearray(room)
            self._body = memoryview(whole)[:room]
            self._have = 0
        return True
