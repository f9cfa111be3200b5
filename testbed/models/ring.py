# SPDX-License-Identifier: Apache-2.0
"""A command ring and the engine that takes commands out of it, one after the other.

It runs while there is something in the ring, and not at all otherwise. A command that fails halts
the engine (unless it says KEEP_GOING), with the cause, the command and the address kept; no fence
is written for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, Generic, Protocol, TypeVar

from testbed.models.access import AccessError, Cause, Mover, Space
from testbed.models.registers import MAX_RING_ENTRIES, CommandFlag, InterruptCause
from testbed.models.tables import RecordLayout
from testbed.models.witness import Event, Witness


class RingCommand(Protocol):
    """What every command has, whatever it does: a record with these fields."""

    def __iter__(self) -> Iterator[int]: ...

    @property
    def opcode(self) -> int: ...  # noqa: D102
    @property
    def flags(self) -> int: ...  # noqa: D102
    @property
    def fence_aperture(self) -> int: ...  # noqa: D102
    @property
    def fence_address(self) -> int: ...  # noqa: D102
    @property
    def fence_value(self) -> int: ...  # noqa: D102


ALL_FLAGS: Final = sum(CommandFlag)
Record = TypeVar("Record", bound=RingCommand)


class Ring(Generic[Record]):
    """One ring. Its owner sets base, aperture, entries and tail, and starts :meth:`run`."""

    def __init__(
        self,
        mover: Mover,
        witness: Witness,
        layout: RecordLayout[Record],
        *,
        space: Callable[[int], Space | None],
        execute: Callable[[Record], Awaitable[bool]],
        interrupt: Callable[[InterruptCause], None],
    ) -> None:
        """``space`` answers what an aperture stands for; ``execute`` carries a command out and
        answers False if there is no such command.
        """
        self._mover = mover
        self._witness = witness
        self._layout = layout
        self._space_of = space
        self._execute = execute
        self._interrupt = interrupt
        self._free = asyncio.Event()
        self._free.set()
        self.reset()

    def reset(self) -> None:
        """As after power-on; whoever ran it has been cancelled."""
        self.base = self.aperture = self.entries = self.head = self.tail = 0
        self.error: AccessError | None = None
        self.error_command = 0
        self.done = self.failed = 0
        self.busy = False

    def place(self, base: int, aperture: int, entries: int) -> None:
        """Take another ring, empty; with a number of entries that cannot be, none."""
        valid = 2 <= entries <= MAX_RING_ENTRIES and not entries & (entries - 1)
        self.base, self.aperture, self.entries = base, aperture, entries if valid else 0
        self.head = self.tail = 0

    def stick(self, *, on: bool) -> None:
        """Take no command any more, as a fault; or go on."""
        if on:
            self._free.clear()
        else:
            self._free.set()

    @property
    def has_work(self) -> bool:
        """Whether :meth:`run` has to be started."""
        return self.error is None and self.head != self.tail and not self.busy

    async def run(self) -> None:
        """Carry out commands until there are none, or one fails."""
        self.busy = True
        try:
            while self.head != self.tail:
                await self._free.wait()
                await self._one(self.head)
                self.head = (self.head + 1) % self.entries
                self.done += 1
                if self.head == self.tail:
                    await self._mover.flush()
        except AccessError as error:
            self.error = error
            self.error_command = self.head
        self.busy = False
        if self.error is not None:
            self._interrupt(InterruptCause.ERROR)

    async def _one(self, index: int) -> None:
        size = self._layout.size_bytes
        place = self.base + index * size
        ring = self._space_of(self.aperture)
        if ring is None:
            raise AccessError(Cause.BAD_COMMAND, place, write=False)
        command = self._layout.decode(await self._mover.read(ring, place, size))
        self._witness.event(Event.COMMAND, address=index, detail=str(command.opcode))
        try:
            known = not command.flags & ~ALL_FLAGS
            if not (known and await self._execute(command)):
                raise AccessError(Cause.BAD_COMMAND, place, write=False)
        except AccessError:
            if not command.flags & CommandFlag.KEEP_GOING:
                raise
            self.failed += 1
            return
        if command.flags & CommandFlag.FENCE:
            space = self._space_of(command.fence_aperture)
            if space is None:
                raise AccessError(Cause.BAD_COMMAND, command.fence_address, write=True)
            value = command.fence_value.to_bytes(8, "little")
            await self._mover.write(space, command.fence_address, value)
        if command.flags & CommandFlag.INTERRUPT:
            self._interrupt(InterruptCause.COMMAND)
