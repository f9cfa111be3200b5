# SPDX-License-Identifier: Apache-2.0
"""What the GPU's commands do: copies, fills, atomics, fences. Formats: `docs/gpu-model.md`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from testbed.models.access import AccessError, Cause, Mover, Space
from testbed.models.gpu_mmu import VirtualSpace
from testbed.models.registers import Command, InterruptCause, Opcode

SPINS: Final = 20  # a WAIT looks that often before it begins to sleep
FIRST_NAP_S: Final = 0.001
LONGEST_NAP_S: Final = 0.02
ROWS_A_TURN: Final = 64


class GpuCommands:
    """Carries out one command at a time."""

    def __init__(
        self,
        mover: Mover,
        virtual: VirtualSpace,
        *,
        space: Callable[[int], Space | None],
        interrupt: Callable[[InterruptCause], None],
    ) -> None:
        self._mover = mover
        self._virtual = virtual
        self._space_of = space
        self._interrupt = interrupt
        self._operations: dict[int, Callable[[Command], Awaitable[None]]] = {
            Opcode.NOP: self._nop,
            Opcode.COPY: self._copy,
            Opcode.COPY_2D: self._copy_2d,
            Opcode.FILL: self._fill,
            Opcode.ATOMIC_ADD: self._atomic_add,
            Opcode.SIGNAL: self._signal,
            Opcode.WAIT: self._wait,
            Opcode.INTERRUPT: self._raise,
            Opcode.INVALIDATE: self._invalidate,
        }

    async def execute(self, command: Command) -> bool:
        """Carry it out, but for its fence; False if there is no such command. AccessError if an
        access fails, or an operand makes no sense.
        """
        operation = self._operations.get(command.opcode)
        if operation is None:
            return False
        await operation(command)
        return True

    def _source(self, command: Command) -> Space:
        space = self._space_of(command.source_aperture)
        if space is None:
            raise AccessError(Cause.BAD_COMMAND, command.source, write=False)
        return space

    def _target(self, command: Command) -> Space:
        space = self._space_of(command.target_aperture)
        if space is None:
            raise AccessError(Cause.BAD_COMMAND, command.target, write=True)
        return space

    async def _nop(self, _command: Command) -> None:
        pass

    async def _copy(self, command: Command) -> None:
        await self._mover.copy(
            self._source(command),
            command.source,
            self._target(command),
            command.target,
            command.size_bytes,
        )

    async def _copy_2d(self, command: Command) -> None:
        source, target = self._source(command), self._target(command)
        for row in range(command.rows):
            await self._mover.copy(
                source,
                command.source + row * command.source_pitch,
                target,
                command.target + row * command.target_pitch,
                command.size_bytes,
            )
            if not row % ROWS_A_TURN:
                await asyncio.sleep(0)

    async def _fill(self, command: Command) -> None:
        pattern = command.value.to_bytes(8, "little")
        target = self._target(command)
        await self._mover.fill(target, command.target, command.size_bytes, pattern)

    async def _atomic_add(self, command: Command) -> None:
        target = self._target(command)
        if command.size_bytes not in (4, 8) or command.target % command.size_bytes:
            raise AccessError(Cause.BAD_COMMAND, command.target, write=True)
        await self._mover.fetch_add(target, command.target, command.value, command.size_bytes)

    async def _signal(self, command: Command) -> None:
        value = command.value.to_bytes(8, "little")
        await self._mover.write(self._target(command), command.target, value)

    async def _wait(self, command: Command) -> None:
        source = self._source(command)
        looks = 0
        nap_s = FIRST_NAP_S
        while await self._look(source, command.source) < command.value:
            looks += 1
            if looks <= SPINS:
                await asyncio.sleep(0)
            else:
                await asyncio.sleep(nap_s)
                nap_s = min(nap_s * 2, LONGEST_NAP_S)

    async def _look(self, source: Space, address: int) -> int:
        """The integer there; without a word to the witness where no message is needed for it."""
        await source.ready(address, write=False)
        window = source.reach(address, 8, write=False)
        if window.view is not None and window.size_bytes == 8:
            return int.from_bytes(window.view, "little")
        return int.from_bytes(await self._mover.read(source, address, 8), "little")

    async def _raise(self, _command: Command) -> None:
        self._interrupt(InterruptCause.COMMAND)

    async def _invalidate(self, command: Command) -> None:
        self._virtual.invalidate(command.target if command.size_bytes else None)
