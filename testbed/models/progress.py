# SPDX-License-Identifier: Apache-2.0
"""What a device's process was in the middle of when it died, kept where its supervisor sees it.

A process that is killed between a request and its answer leaves QEMU waiting, and the guest's
processor with it, until QEMU's own deadline (30 s). So the request under way is noted in a page
that both processes share; see :meth:`Progress.settle`.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import socket
from struct import Struct
from typing import Final

from testbed.models import wire

SETTLE_TIMEOUT_S: Final = 1.0  # the rest of a message is on its way already

# Whether there is one; whether it wants an answer; its number and command; bytes not yet received.
_NOTE: Final = Struct("<BBHHI")


class Progress:
    """One device's page; make it before the process is forked."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    def begin(self, header: wire.Header, size_bytes: int) -> None:
        """A request's header was received, and ``size_bytes`` follow it."""
        wants = not header.is_reply and not header.flags & wire.NO_REPLY
        _NOTE.pack_into(self._page, 0, 1, wants, header.message_id, header.command, size_bytes)

    def left(self, size_bytes: int) -> None:
        """So many bytes of it are still to be received."""
        (_, wants, number, command, _) = _NOTE.unpack_from(self._page)
        _NOTE.pack_into(self._page, 0, 1, wants, number, command, size_bytes)

    def done(self) -> None:
        """It has been answered."""
        self._page[0] = 0

    def settle(self, connection: socket.socket) -> None:
        """The process is dead: receive what is left of its request, and answer that it failed.

        The answer has a header and nothing more. Should the process have died just after its own,
        QEMU drops this one as unexpected (hw/vfio-user/proxy.c), and stays in step.
        """
        under_way, wants, number, command, left = _NOTE.unpack_from(self._page)
        if not under_way:
            return
        self.done()
        connection.settimeout(SETTLE_TIMEOUT_S)
        with contextlib.suppress(OSError):
            while left and (data := connection.recv(left)):
                left -= len(data)
            if wants:
                answer = wire.encode_header(number, command, 0, wire.ERROR_REPLY, errno.EIO)
                connection.send(answer)
