# SPDX-License-Identifier: Apache-2.0
"""What a device's process was in the middle of when it died, kept where its supervisor sees it.

A process that is killed between a request and its answer leaves QEMU waiting, and the guest's
processor with it, until QEMU's own deadline (30 s). So what it receives is received into a page
that both processes share, with a note of how far it came; see :meth:`Progress.settle`.
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

# Where in the inbox the first request stands that was not answered yet; where what was received
# ends; bytes of a long one that were not received yet, and are received elsewhere.
_NOTE: Final = Struct("<III")
_INBOX_AT: Final = 16
_HEADER_BYTES: Final = wire.HEADER.size_bytes


class Progress:
    """One device's page; make it before the process is forked. A channel receives into ``inbox``,
    and says so.
    """

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self.inbox = memoryview(self._page)[_INBOX_AT:]

    def note(self, start: int, end: int, left: int = 0) -> None:
        """``inbox[start:end]`` is what was received and not answered. ``left``: of the request that
        begins there so many bytes are still to come, and will not be in the inbox.
        """
        _NOTE.pack_into(self._page, 0, start, end, left)

    def settle(self, connection: socket.socket) -> bytes:
        """The process is dead: receive what is left of the request that it was in, and answer that
        it failed. Returns what else it had received: requests that it had not begun.

        The answer has a header and nothing more. Should the process have died just after its own,
        QEMU drops this one as unexpected (hw/vfio-user/proxy.c), and stays in step.
        """
        start, end, left = _NOTE.unpack_from(self._page)
        self.note(0, 0)
        received = bytes(self.inbox[start:end])
        connection.settimeout(SETTLE_TIMEOUT_S)
        with contextlib.suppress(OSError):
            while received and len(received) < _HEADER_BYTES:
                if not (data := connection.recv(_HEADER_BYTES - len(received))):
                    return b""
                received += data
            if not received:
                return b""
            header = wire.HEADER.decode(received[:_HEADER_BYTES])
            left = left or max(0, header.size - len(received))
            while left and (data := connection.recv(left)):
                left -= len(data)
            if not header.is_reply and not header.flags & wire.NO_REPLY:
                number, command = header.message_id, header.command
                answer = wire.encode_header(number, command, 0, wire.ERROR_REPLY, errno.EIO)
                connection.send(answer)
            return received[header.size :]
        return b""
