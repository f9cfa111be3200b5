# SPDX-License-Identifier: Apache-2.0
"""Private links between GPUs: of one rack node, or of two.

The two ends of a link talk over a unix socket of their own (SOCK_SEQPACKET, one JSON object a
message). Each gives the other its video memory once, as a descriptor, and from then on says what of
it is exported. Accesses then go straight to that memory, at the speed of memcpy; but every one is
checked, page by page if need be, against what the owner exports at that moment. An end that is gone
takes the link down at once, whatever killed it.

A new export holds when the other end has acknowledged it: SYNC in the owner's registers.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Final, NamedTuple

from testbed.errors import InputError
from testbed.models.access import AccessError, Cause, Space, Window
from testbed.models.memory import NotMappable, SharedMemory
from testbed.models.pacing import NO_TIMING, Duplex, Timing
from testbed.models.paging import TranslationCache, Untranslatable
from testbed.models.registers import Aperture, Export, LinkState
from testbed.models.witness import Path

MAX_MESSAGE_BYTES: Final = 4096
RETRY_FIRST_S: Final = 0.02
RETRY_LAST_S: Final = 1.0
RUN_BYTES: Final = 8 << 20


class ExportWindow(NamedTuple):
    """What one end lets the other reach: link addresses 0 to ``size_bytes``."""

    mode: Export = Export.CLOSED
    base: int = 0
    size_bytes: int = 0


class LinkEnd(NamedTuple):
    """One end, as the rack describes it.

    ``socket``  where the two ends meet. ``listens``: this end makes it, the other connects.
    ``peer``    the other GPU's name, for the trace. ``width`` in lanes.
    ``timing``  what all lanes together carry.
    """

    socket: FilePath
    listens: bool
    peer: str
    width: int = 16
    timing: Timing = NO_TIMING


class LinkPort(Space):
    """One end of a link, and the space of addresses that the other end exports."""

    path = Path.LINK

    def __init__(
        self,
        end: LinkEnd,
        memory: SharedMemory,
        *,
        on_change: Callable[[], None],
        on_refused: Callable[[str, int, bool], None],
    ) -> None:
        """``memory`` is this GPU's. ``on_change``: the state, or what the peer exports, is another.
        ``on_refused``: the peer (its name) tried an address that this end does not export.
        """
        self.end = end
        self.timing = end.timing
        self.width = end.width
        self._pipes = Duplex()
        self._memory = memory
        self._on_change = on_change
        self._on_refused = on_refused
        self._peer_memory: SharedMemory | None = None
        self._peer_export = ExportWindow()
        self._peer_enabled = False
        self._cache = TranslationCache()
        self.enabled = True
        self._powered = False  # a machine is plugged into this end's GPU
        self._cut = False
        self._export = ExportWindow()
        self._sequence = 0
        self._acknowledged = 0
        self._listener: socket.socket | None = None
        self._connection: socket.socket | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = RETRY_FIRST_S
        self._open = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- what the GPU's registers show and set

    @property
    def state(self) -> LinkState:
        """Up only while both ends are there and enabled."""
        usable = self._usable and self._peer_enabled and self._peer_memory is not None
        return LinkState.UP if usable else LinkState.DOWN

    @property
    def peer_size_bytes(self) -> int:
        """How much the peer exports; 0 while the link is down."""
        return self._peer_export.size_bytes if self.state is LinkState.UP else 0

    @property
    def synchronizing(self) -> bool:
        """True until the peer has acknowledged the latest export, or is gone."""
        return self._connection is not None and self._acknowledged != self._sequence

    @property
    def _usable(self) -> bool:
        return self.enabled and self._powered and not self._cut

    def enable(self, *, on: bool) -> None:
        """The driver enables or disables its end."""
        if on != self.enabled:
            self.enabled = on
            self._tell()
            self._on_change()

    def power(self, *, on: bool) -> None:
        """This end's machine is there, or gone."""
        if on != self._powered:
            self._powered = on
            self._tell()
            self._on_change()

    def cut(self, *, on: bool) -> None:
        """Cut the link, as a fault, or mend it."""
        if on != self._cut:
            self._cut = on
            self._tell()
            self._on_change()

    def narrow(self, lanes: int) -> None:
        """Use only so many lanes, as a fault; InputError if there are not that many."""
        if not 1 <= lanes <= self.end.width:
            raise InputError(f"the link to '{self.end.peer}' has 1 to {self.end.width} lanes")
        if lanes != self.width:
            self.width = lanes
            self._on_change()

    def restore(self) -> None:
        """Undo :meth:`cut` and :meth:`narrow`, and any other timing."""
        self.timing = self.end.timing
        self.narrow(self.end.width)
        self.cut(on=False)

    def export(self, window: ExportWindow) -> None:
        """Export something else from now on, and have the peer forget what it knew."""
        self._export = window
        self._tell()

    def reset(self) -> None:
        """Enabled, and nothing exported."""
        self.enabled = True
        self.export(ExportWindow())
        self._on_change()

    # --- the space

    def reach(self, address: int, size_bytes: int, *, write: bool) -> Window:
        """See :meth:`Space.reach`; LINK_DOWN, or LINK_REFUSED for what the peer does not export."""
        memory = self._peer_memory
        if memory is None or self.state is not LinkState.UP:
            raise AccessError(Cause.LINK_DOWN, address, write=write)
        window = self._peer_export
        size = min(size_bytes, window.size_bytes - address)
        if size <= 0:
            raise self._refused(address, write=write)
        if window.mode is Export.VIRTUAL:
            try:
                run = self._cache.find_run(
                    memory, window.base, address, min(size, RUN_BYTES), write=write
                )
            except Untranslatable as error:
                raise self._refused(address, write=write) from error
            if run.aperture != Aperture.VRAM:
                raise self._refused(address, write=write)
            size = min(size, run.end - address)
            start = run.address + (address - run.start)
        else:
            start = window.base + address
        size = min(size, memory.size_bytes - start)
        if size <= 0:
            raise self._refused(address, write=write)
        view = memory.view[start : start + size]
        return Window(size, view, Path.LINK, self.end.peer, self, address)

    def book(self, window: Window, size_bytes: int, began_s: float, *, write: bool) -> float:
        """See :meth:`Space.book`; with some of the lanes, their share of the bandwidth."""
        del window
        timing = self.timing
        if self.width < self.end.width:
            share = self.width / self.end.width
            timing = replace(timing, bytes_per_s=timing.bytes_per_s * share)
        return self._pipes.book(size_bytes, timing, began_s, write=write)

    def _refused(self, address: int, *, write: bool) -> AccessError:
        self._send({"refused": address, "write": write})
        return AccessError(Cause.LINK_REFUSED, address, write=write)

    # --- the connection

    def open(self) -> None:
        """Listen, or connect as soon as the other end listens; in the running loop. OSError if
        the path is not free.
        """
        self._loop = asyncio.get_running_loop()
        self._open = True
        if not self.end.listens:
            self._connect()
            return
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        self._listener.bind(str(self.end.socket))
        self._listener.listen(1)
        self._running.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Hang up for good."""
        self._open = False
        if self._retry is not None:
            self._retry.cancel()
        if self._listener is not None:
            self._running.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            self.end.socket.unlink(missing_ok=True)
        self._hang_up()

    @property
    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("the link was never opened")
        return self._loop

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            connection.connect(str(self.end.socket))
        except OSError:
            connection.close()
            self._retry_s = min(self._retry_s * 2, RETRY_LAST_S)
            self._retry = self._running.call_later(self._retry_s, self._connect)
            return
        self._retry_s = RETRY_FIRST_S
        self._begin(connection)

    def _accept(self) -> None:
        if self._listener is None:
            return
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._hang_up()  # a peer that was restarted replaces the one before
            self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        self._connection = connection
        self._running.add_reader(connection, self._readable)
        self._tell(self._memory.fd)

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._running.remove_reader(connection)
        connection.close()
        self._peer_memory = None
        self._peer_enabled = False
        self._peer_export = ExportWindow()
        self._cache.clear()
        self._on_change()

    def _lost(self) -> None:
        self._hang_up()
        if self._open and not self.end.listens:
            self._retry = self._running.call_later(self._retry_s, self._connect)

    def _tell(self, fd: int = -1) -> None:
        """Send this end's whole state; the peer acknowledges its number."""
        self._sequence += 1
        self._send(
            {
                "sequence": self._sequence,
                "enabled": self._usable,
                "mode": self._export.mode,
                "base": self._export.base,
                "size_bytes": self._export.size_bytes,
            },
            fd,
        )

    def _send(self, message: dict[str, int], fd: int = -1) -> None:
        if self._connection is None:
            return
        try:
            fds = [fd] if fd >= 0 else []
            socket.send_fds(self._connection, [json.dumps(message).encode()], fds)
        except BlockingIOError:
            if "sequence" in message:  # a peer that does not read what it must know
                self._lost()
        except OSError:
            self._lost()

    def _readable(self) -> None:
        connection = self._connection
        if connection is None:
            return
        fds = array.array("i")
        try:
            data, ancillary, flags, _ = connection.recvmsg(
                MAX_MESSAGE_BYTES, socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self._lost()
            return
        for _, kind, content in ancillary:
            if kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        try:
            if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                self._lost()
            else:
                self._message(data, fds)
        except (ValueError, KeyError, TypeError, RecursionError, NotMappable) as error:
            sys.stderr.write(f"link to {self.end.peer}: {error}\n")
            self._lost()
        finally:
            for fd in fds:
                os.close(fd)

    def _message(self, data: bytes, fds: array.array[int]) -> None:
        message = json.loads(data)
        if "refused" in message:
            self._on_refused(self.end.peer, int(message["refused"]), bool(message["write"]))
            return
        if "acknowledged" in message:
            self._acknowledged = int(message["acknowledged"])
            return
        window = ExportWindow(
            Export.of(message["mode"]), int(message["base"]), int(message["size_bytes"])
        )
        if window.base < 0 or window.size_bytes < 0:
            raise ValueError("a window with negative numbers")
        if fds:
            self._peer_memory = SharedMemory(fds[0], name=self.end.peer)
        self._peer_enabled = bool(message["enabled"])
        self._peer_export = window
        self._cache.clear()
        self._send({"acknowledged": int(message["sequence"])})
        self._on_change()
