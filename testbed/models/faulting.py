# SPDX-License-Identifier: Apache-2.0
"""Page faults that the driver repairs and replays: the fault buffer and those who wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from testbed.models.access import AccessError, Mover, Space
from testbed.models.registers import (
    FAULT_RECORD,
    MAX_FAULT_ENTRIES,
    FaultCause,
    FaultRecord,
    Replay,
)
from testbed.models.witness import Event, Witness


class FaultUnit:
    """The fault buffer of one device; its owner sets base, entries and get."""

    def __init__(
        self, mover: Mover, space: Space, witness: Witness, notify: Callable[[], None]
    ) -> None:
        self._mover = mover
        self._space = space
        self._witness = witness
        self._notify = notify
        self._waiting: set[asyncio.Future[Replay]] = set()
        self._writing = asyncio.Lock()
        self.reset()

    def reset(self) -> None:
        """As after power-on; whoever still waits is told that nothing will be repaired."""
        self.replay(Replay.CANCEL)
        self.base = self.entries = self.put = self.get = self.lost = self.total = 0

    @property
    def waiting(self) -> bool:
        """Whether an access waits for :meth:`replay`."""
        return bool(self._waiting)

    async def report(self, address: int, command: int, cause: FaultCause, *, write: bool) -> None:
        """Write a record, or count it as lost, and notify."""
        self.total += 1
        self._witness.event(Event.PAGE_FAULT, address=address, detail=cause.text)
        record = FaultRecord(address, command, int(write), cause, 0, time.monotonic_ns(), 0)
        async with self._writing:  # one after the other: `put` says that all before it are there
            entries = min(self.entries, MAX_FAULT_ENTRIES)
            following = (self.put + 1) % entries if entries else 0
            if not entries or following == self.get % entries:
                self.lost += 1
            else:
                place = self.base + self.put * FAULT_RECORD.size_bytes
                try:
                    await self._mover.write(self._space, place, FAULT_RECORD.encode(record))
                    self.put = following
                except AccessError:
                    self.lost += 1
        self._notify()

    async def repair(self, address: int, command: int, cause: FaultCause, *, write: bool) -> Replay:
        """Report, and wait for what the driver decides."""
        decision: asyncio.Future[Replay] = asyncio.get_running_loop().create_future()
        self._waiting.add(decision)
        try:
            await self.report(address, command, cause, write=write)
            return await decision
        finally:
            self._waiting.discard(decision)

    def replay(self, decision: Replay) -> None:
        """The driver has decided for all that wait; ignored when nothing does."""
        if self._waiting:
            self._witness.event(Event.REPLAY, detail=decision.name.lower())
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(decision)
