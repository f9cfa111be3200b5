# SPDX-License-Identifier: Apache-2.0
"""The GPU's MMU as a space: virtual addresses, with faults that are reported and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from testbed.models.access import AccessError, Cause, Space, Window
from testbed.models.faulting import FaultUnit
from testbed.models.memory import SharedMemory
from testbed.models.paging import TranslationCache, Untranslatable
from testbed.models.registers import Aperture, FaultCause, MmuControl, Replay
from testbed.models.witness import Event, Path, Witness

RUN_BYTES: Final = 8 << 20  # pages that continue each other are used together, up to so much


class VirtualSpace(Space):
    """Virtual addresses of one GPU."""

    path = Path.LOCAL

    def __init__(
        self,
        vram: SharedMemory,
        witness: Witness,
        faults: FaultUnit,
        *,
        aperture: Callable[[int], Space | None],
        command: Callable[[], int],
    ) -> None:
        """``aperture`` answers the space that an aperture byte stands for, ``command`` the index of
        the command under way, for fault records.
        """
        self._vram = vram
        self._witness = witness
        self._faults = faults
        self._aperture = aperture
        self._cache = TranslationCache()
        self.command = command
        self.control = 0
        self.root = 0

    def reach(self, address: int, size_bytes: int, *, write: bool) -> Window:
        """See :meth:`Space.reach`; PAGE_FAULT where there is no translation."""
        if not self.control & MmuControl.ENABLE:
            raise AccessError(Cause.PAGE_FAULT, address, write=write)
        try:
            run = self._cache.find_run(
                self._vram, self.root, address, min(size_bytes, RUN_BYTES), write=write
            )
        except Untranslatable as error:
            raise AccessError(Cause.PAGE_FAULT, address, write=write) from error
        space = self._aperture(run.aperture)
        if space is None:
            raise AccessError(Cause.PAGE_FAULT, address, write=write)
        size = min(size_bytes, run.end - address)
        return space.reach(run.address + (address - run.start), size, write=write)

    async def ready(self, address: int, *, write: bool) -> None:
        """Report a fault and wait for its replay, as often as it takes."""
        while self.control & MmuControl.ENABLE:
            bus = self._aperture(Aperture.SYSTEM)
            if bus is not None:
                await bus.ready(address, write=write)
            try:
                found = self._cache.find(self._vram, self.root, address, write=write)
            except Untranslatable as error:
                cause = error.cause
            else:
                if self._aperture(found.aperture) is not None:
                    return
                cause = FaultCause.BAD_ENTRY
                self._cache.forget(address)
            if not self.control & MmuControl.REPLAYABLE:
                await self._faults.report(address, self.command(), cause, write=write)
                break
            decision = await self._faults.repair(address, self.command(), cause, write=write)
            if decision is Replay.CANCEL:
                break
            if cause is FaultCause.NOT_WRITABLE:
                self._cache.forget(address)  # a replay looks at the tables again
        raise AccessError(Cause.PAGE_FAULT, address, write=write)

    def invalidate(self, address: int | None) -> None:
        """Forget one page, or all."""
        self._witness.event(
            Event.INVALIDATION, address=address or 0, detail="" if address else "all"
        )
        if address is None:
            self._cache.clear()
        else:
            self._cache.forget(address)

    def reset(self) -> None:
        """As after power-on."""
        self._cache.clear()
        self.control = self.root = 0
