# SPDX-License-Identifier: Apache-2.0
"""A stream of vfio-user messages over a unix socket, in an asyncio loop, for either side.

The channel frames, collects the descriptors that come along, sends without blocking, and ends on
anything that is no message. It knows nothing of what the messages mean. Its bounds:

* a message is at most :data:`wire.MAX_MESSAGE_BYTES` long and brings at most
  :data:`wire.MAX_MESSAGE_FDS` descriptors, all of which are closed unless the receiver takes them;
* who does not read its replies is not read from any more (:data:`MAX_UNSENT_BYTES`);
* at most :data:`MESSAGES_A_TURN` messages are handled at a time, twice that before other channels
  have their turn.

It receives as much as there is, up to a page, at once. A read ends with the piece of the stream
that brought descriptors (unix(7); net/unix/af_unix.c), so they belong to the message of which the
last byte of that read is part, if who sent it sent no two messages by one call. QEMU does not.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import PurePath
from typing import Final, Protocol

from testbed.models import wire
from testbed.models.progress import Progress

MESSAGES_A_TURN: Final = 64
MAX_UNSENT_BYTES: Final = 4 << 20
MAX_DRAINED: Final = 4096

_ANCILLARY_BYTES = socket.CMSG_SPACE(wire.MAX_MESSAGE_FDS * array.array("i").itemsize)
_HEADER_BYTES = wire.HEADER.size_bytes
_INBOX_BYTES = 4096
# As plain numbers: an operation on one of socket's flags takes longer than the read itself.
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_CTRUNC)


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
        self,
        connection: socket.socket,
        receiver: Receiver,
        progress: Progress | None = None,
        received: bytes = b"",
    ) -> None:
        """``progress`` has the inbox, and is told how far it was handled. ``received``: what
        someone else has received before.
        """
        connection.setblocking(False)
        self._progress = progress
        self._socket = connection
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._inbox = progress.inbox if progress else memoryview(bytearray(_INBOX_BYTES))
        self._inbox[: len(received)] = received
        self._start, self._end = 0, len(received)  # what of it was not handled
        self._body: memoryview | None = None  # of a message that is longer than the inbox
        self._have = 0  # bytes of that
        self._called = False  # to handle more
        self._fds: list[tuple[int, list[int]]] = []  # with the place of the read's last byte
        self._note()
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
                if not self._socket.recv(_INBOX_BYTES):
                    break

    def _pause(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._socket)
            self._reading = False

    def _resume(self) -> None:
        if self._open and not self._reading:
            self._loop.add_reader(self._socket, self._readable)
            self._reading = True
            self._handle_the_rest()

    def _close_fds(self) -> None:
        for _, fds in self._fds:
            for fd in fds:
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
        self._guarded(self._receive)

    def _handle_the_rest(self) -> None:
        """Soon, if there is any: nothing need come for what is in the inbox."""
        if self._start < self._end and not self._called:
            self._called = True
            self._loop.call_soon(self._handle_more)

    def _handle_more(self) -> None:
        self._called = False
        self._guarded(self._handle)

    def _guarded(self, action: Callable[[], None]) -> None:
        """Whatever goes wrong with a message ends this channel, and nothing else."""
        try:
            action()
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

    def _receive(self) -> None:
        """Receive once, and handle what is whole then. If there is more, the loop calls again."""
        if self._body is not None:
            self._receive_body(self._body)
            return
        if self._start:  # behind it there may be no room for the rest of a message
            self._inbox[: self._end - self._start] = bytes(self._inbox[self._start : self._end])
            self._fds = [(at - self._start, fds) for at, fds in self._fds]
            self._start, self._end = 0, self._end - self._start
            self._note()
        count, ancillary, flags, _ = self._socket.recvmsg_into(
            [self._inbox[self._end :]], _ANCILLARY_BYTES, _CLOSE_ON_EXEC
        )
        if ancillary:
            self._keep_descriptors(ancillary, self._end + count - 1)
        if flags & _TRUNCATED:
            raise wire.Malformed("too many descriptors")
        if not count:
            self._other_side_ended(within=self._end > 0)
            return
        self._end += count
        self._note()
        self._handle()

    def _handle(self) -> None:
        """Handle the messages in the inbox that are whole, but only so many at a time."""
        for _ in range(MESSAGES_A_TURN):
            if not self._reading or self._body is not None:
                return
            have = self._end - self._start
            if have < _HEADER_BYTES:
                break
            header = wire.header_at(self._inbox, self._start)
            size = header.size
            if not _HEADER_BYTES <= size <= wire.MAX_MESSAGE_BYTES:
                raise wire.Malformed(f"a message of {size} bytes")
            if have < size:
                if size > len(self._inbox):
                    self._begin_body(size - _HEADER_BYTES)
                break
            stop = self._start + size
            self._deliver(header, self._inbox[self._start + _HEADER_BYTES : stop], stop)
            self._answered(stop)
        else:
            self._handle_the_rest()
            return
        if self._fds and sum(len(fds) for _, fds in self._fds) > wire.MAX_MESSAGE_FDS:
            raise wire.Malformed("too many descriptors")

    def _answered(self, stop: int) -> None:
        """What was received up to ``stop`` is done with."""
        self._start = stop
        if stop == self._end:
            self._start = self._end = 0
        self._note()

    def _note(self, left: int = 0) -> None:
        if self._progress is not None:
            self._progress.note(self._start, self._end, left)

    def _deliver(self, header: wire.Header, body: memoryview, stop: int) -> None:
        """Hand over one message, which ends before ``stop``, with its descriptors."""
        taken: list[int] = []
        while self._fds and self._fds[0][0] < stop:
            taken += self._fds.pop(0)[1]
        try:
            if len(taken) > wire.MAX_MESSAGE_FDS:
                raise wire.Malformed("too many descriptors")
            self._receiver.message(header, body, taken)
        finally:
            for fd in taken:
                os.close(fd)

    def _begin_body(self, room: int) -> None:
        """The message in the inbox is too long for it: what follows its header goes elsewhere."""
        part = self._inbox[self._start + _HEADER_BYTES : self._end]
        self._body = memoryview(bytearray(room))
        self._body[: len(part)] = part
        self._have = len(part)
        self._end = self._start + _HEADER_BYTES
        self._receive_body(self._body)

    def _receive_body(self, body: memoryview) -> None:
        while self._have < len(body):
            self._note(len(body) - self._have)
            # Without room for ancillary data the kernel drops descriptors that come here.
            count = self._socket.recv_into(body[self._have :])
            if not count:
                self._other_side_ended(within=True)
                return
            self._have += count
        self._body = None
        header = wire.header_at(self._inbox, self._start)
        # All descriptors that are there are its own: nothing was received behind it.
        self._deliver(header, body, sys.maxsize)
        self._answered(self._end)

    def _keep_descriptors(self, ancillary: list[tuple[int, int, bytes]], at: int) -> None:
        numbers = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
        self._fds.append((at, list(numbers)))

    def _other_side_ended(self, *, within: bool) -> None:
        self.close("the other side is gone" + (" (within a message)" if within else ""))
