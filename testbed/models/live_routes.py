# SPDX-License-Identifier: Apache-2.0
"""A device's routes as the running machine's switches stand: asked for when first needed, and again
when something has changed.

Before an access the device looks at QEMU's log, one system call as long as nothing was written, and
one look is good until the event loop runs again: no doorbell can come in between. If new lines
speak of a change of the tree, the access waits until the supervisor
(:mod:`testbed.models.switchyard`) has told the routes anew. Should it not know them within
:data:`REFRESH_TIMEOUT_S`, nothing is routed: accesses go up, where the IOMMU judges them, and each
is counted as ``routes_unknown``.

Where QEMU logs no such changes, routes are asked for anew after a reset of the function and after a
write to its configuration space.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

from testbed.errors import InputError
from testbed.models.access import AccessError, Cause, Space, Window
from testbed.models.calls import Caller, CallFailed
from testbed.models.change_log import ChangeLog
from testbed.models.fabric import Outcome
from testbed.models.memory import SharedMemory
from testbed.models.routing import Nowhere, Route, Routed, TableRouter
from testbed.models.witness import Event, Path, Witness

REFRESH_TIMEOUT_S: Final = 3.0  # the supervisor gives QEMU two
RETRY_S: Final = 1.0  # after a failure: an access shall not wait each time
REGISTER_TIMEOUT_S: Final = 12.0  # the supervisor gives the peer ten
REGISTER_BYTES: Final = 8
UNWATCHED: Final = -1


class LiveRouter:
    """A :class:`testbed.models.routing.Router`. ``memories`` are all of the node, by name."""

    def __init__(
        self,
        caller: Caller,
        log: ChangeLog,
        memories: Mapping[str, SharedMemory],
        witness: Witness,
    ) -> None:
        self._caller = caller
        self._log = log
        self._memories = memories
        self._witness = witness
        self._table = TableRouter()
        self._known = False
        self._stale = True
        self._watched = False
        self._looked = False  # since the event loop last ran
        self._retry_s = 0.0
        self._turn = asyncio.Lock()

    def stale(self) -> bool:
        """See :class:`testbed.models.routing.Router`."""
        if not self._stale:
            if self._looked or not self._watched:
                return False
            if not self._log.changed():
                self._looked = True
                asyncio.get_running_loop().call_soon(self._look_again)
                return False
            self._stale = True
        return time.monotonic() >= self._retry_s

    def _look_again(self) -> None:
        self._looked = False

    async def refresh(self) -> None:
        """Ask the supervisor."""
        async with self._turn:
            if not self.stale():
                return
            self._known = False
            try:
                answer = await self._caller.call(
                    "routes", {"seen": self._log.size_bytes()}, timeout_s=REFRESH_TIMEOUT_S
                )
                self._take(answer)
            except (CallFailed, InputError, OSError) as error:
                self._table.replace([])
                self._retry_s = time.monotonic() + RETRY_S
                self._witness.event(Event.ROUTES_UNKNOWN, detail=str(error))

    def invalidate(self) -> None:
        """See :class:`testbed.models.routing.Router`; needless where QEMU's log tells."""
        self._stale = self._stale or not self._watched

    def forget(self) -> None:
        """See :class:`testbed.models.routing.Router`."""
        self._table.replace([])
        self._known = self._watched = False
        self._stale = True
        self._retry_s = 0.0
        self._log.close()

    def route(self, address: int, size_bytes: int) -> Routed:
        """See :class:`testbed.models.routing.Router`."""
        if not self._known:
            self._witness.event(Event.ROUTES_UNKNOWN, address=address, detail="sent upstream")
        routed = self._table.route(address, size_bytes)
        if routed.astray:
            self._witness.event(
                Event.PEER_UNREACHABLE, address=address, detail="a register in QEMU: sent upstream"
            )
        return routed

    def _take(self, answer: Mapping[str, Any]) -> None:
        self._table.replace(
            [
                self._route(entry)
                for entry in answer["routes"]
                if entry["outcome"] != Outcome.UPSTREAM
            ]
        )
        self._watched = answer["as_of"] != UNWATCHED
        if self._watched:
            self._log.follow(answer["as_of"])
        self._known = True
        self._stale = False
        self._witness.event(Event.ROUTES_READ, detail=f"{len(answer['routes'])} ranges")

    def _route(self, entry: Mapping[str, Any]) -> Route:
        address, size = entry["address"], entry["size_bytes"]
        if entry["outcome"] == Outcome.REFUSED:
            return Route(address, size, space=Nowhere())
        memory = self._memories.get(entry["memory"] or "")
        if memory is not None:
            return Route(address, size, memory, entry["offset"])
        if entry["device"] is None:
            return Route(address, size)
        first = address - entry["offset"]
        return Route(
            address, size, space=PeerRegisters(self._caller, entry["device"], entry["bar"], first)
        )


class PeerRegisters(Space):
    """A BAR of another model of this node, register by register: its process carries it out."""

    path = Path.PEER

    def __init__(self, caller: Caller, device: str, bar: int, first: int) -> None:
        """``first`` is the bus address of the BAR's start."""
        self._caller = caller
        self._device = device
        self._bar = bar
        self._first = first

    def reach(self, address: int, size_bytes: int, *, write: bool) -> Window:
        """See :meth:`Space.reach`: at most one register, aligned to its size."""
        del write
        size = REGISTER_BYTES
        while size > size_bytes or address % size:
            size //= 2
        return Window(size, None, self.path, f"{self._device} BAR{self._bar}", self, address)

    async def fetch(self, address: int, size_bytes: int) -> bytes:
        """Read a register; REFUSED if the peer is lost."""
        return await self._access(address, {"size_bytes": size_bytes}, write=False)

    async def store(self, address: int, data: bytes) -> None:
        """Write one, likewise."""
        await self._access(address, {"data": data.hex()}, write=True)

    async def _access(self, address: int, what: Mapping[str, Any], *, write: bool) -> bytes:
        place = {"device": self._device, "bar": self._bar, "offset": address - self._first}
        try:
            answer = await self._caller.call(
                "register", {**place, **what}, timeout_s=REGISTER_TIMEOUT_S
            )
        except CallFailed as error:
            raise AccessError(Cause.REFUSED, address, write=write) from error
        return bytes.fromhex(answer)
