# SPDX-License-Identifier: Apache-2.0
"""QEMU's ``edu`` device (docs/specs/edu.rst, hw/misc/edu.c): a simple DMA engine, and a doorbell.

It moves up to 4 KiB a time between the bus and a buffer of its own, 100 ms each way. A 32-bit write
to its register 0x60, by the CPU or by another device, raises its interrupt: being rung.
"""

from __future__ import annotations

import time

from guest_agent.hw.engine import PAGE_BYTES, Engine, Scratch, Stopwatch, check_doorbell
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

    from guest_agent.hw.device import Device
    from guest_agent.hw.region import Region

_BUFFER = 0x40000
_BUFFER_BYTES = 4096
_IRQ_STATUS = 0x24
_IRQ_RAISE = 0x60  # the doorbell
_IRQ_ACKNOWLEDGE = 0x64
_DMA_INTERRUPT = 0x100  # the status bit of a DMA that has ended; others are rings
_DMA_SOURCE = 0x80
_DMA_TARGET = 0x88
_DMA_COUNT = 0x90
_DMA_COMMAND = 0x98
_RUN = 1
_TO_BUS = 2
_INTERRUPT = 4
_POLL_S = 0.002
_POISON = 0xDEADED00DEADED00


class Edu(Engine):
    """Copies in pieces of 4 KiB through the device's buffer: two DMAs each, 0.2 s.

    Scratch memory (4 KiB) is needed for ``write32`` and lets ``copy`` overwrite what an earlier
    call left in the buffer; without it a refused read may hand on stale bytes.
    The device has no reset: a DMA that does not end keeps it busy.
    """

    kind: ClassVar[str] = "edu"
    identity: ClassVar[tuple[int, int]] = (0x1234, 0x11E8)
    max_copy_bytes: ClassVar[int] = 1 << 20
    can: ClassVar[tuple[str, ...]] = ("copy", "write32", "storm", "burst")

    def __init__(self, device: Device, scratch: Scratch | None) -> None:
        super().__init__(device, scratch)
        self._registers: Region = device.region(0)

    def open(self) -> None:
        """:raises TimeoutError: a DMA from before does not end."""
        if not self.settled(Stopwatch(1.0)):
            raise TimeoutError(f"edu {self.device.bdf}: a DMA from before does not end")

    def copy(
        self, source_iova: int, target_iova: int, size_bytes: int, timeout_s: float
    ) -> dict[str, Any]:
        """See :meth:`Engine.copy`."""
        self.check_copy(size_bytes)
        watch = Stopwatch(timeout_s)
        done = chunks = 0
        completed = self._overwrite_buffer(watch)
        while completed and done < size_bytes:
            size = min(_BUFFER_BYTES, size_bytes - done)
            completed = self._dma(source_iova + done, size, 0, watch) and self._dma(
                target_iova + done, size, _TO_BUS, watch
            )
            if completed:
                done += size
                chunks += 1
        return self._answer(watch, completed, done, chunks)

    def write32(self, iova: int, value: int, timeout_s: float) -> dict[str, Any]:
        """See :meth:`Engine.write32`: the value goes through the scratch memory and the buffer."""
        check_doorbell(iova, value)
        if self.scratch is None:
            raise ParameterError("engine: write32 needs scratch memory")
        watch = Stopwatch(timeout_s)
        self.scratch.region.write32(self.scratch.offset, value)
        completed = self._dma(self.scratch.iova, 4, 0, watch) and self._dma(iova, 4, _TO_BUS, watch)
        return self._answer(watch, completed, 4 * completed, 1 * completed)

    def storm(self, iova: int, count: int, access: str, timeout_s: float) -> dict[str, Any]:
        """See :meth:`Engine.storm`; ten a second."""
        watch = Stopwatch(timeout_s)
        direction = _TO_BUS if access == "write" else 0
        done = 0
        while done < count and self._dma(iova + done * PAGE_BYTES, 4, direction, watch):
            done += 1
        return self._answer(watch, done == count, 4 * done, done)

    def start(self, iova: int, access: str) -> None:
        """See :meth:`Engine.start`."""
        self._start(iova, 4, _TO_BUS if access == "write" else 0)

    def close(self) -> None:
        """Wait for a DMA under way to end."""
        self.settled(Stopwatch(1.0))

    def _overwrite_buffer(self, watch: Stopwatch) -> bool:
        if self.scratch is None or self.scratch.size_bytes < _BUFFER_BYTES:
            return True
        for offset in range(0, _BUFFER_BYTES, 8):
            self.scratch.region.write64(self.scratch.offset + offset, _POISON)
        return self._dma(self.scratch.iova, _BUFFER_BYTES, 0, watch)

    def _dma(self, iova: int, size_bytes: int, direction: int, watch: Stopwatch) -> bool:
        self._start(iova, size_bytes, direction)
        return self.settled(watch)

    def _start(self, iova: int, size_bytes: int, direction: int) -> None:
        source, target = (_BUFFER, iova) if direction else (iova, _BUFFER)
        interrupt = _INTERRUPT * self.device.is_armed()
        self._registers.write64(_DMA_SOURCE, source)
        self._registers.write64(_DMA_TARGET, target)
        self._registers.write64(_DMA_COUNT, size_bytes)
        self._registers.write64(_DMA_COMMAND, _RUN | direction | interrupt)

    def settled(self, watch: Stopwatch) -> bool:
        """See :meth:`Engine.settled`."""
        while self._registers.read32(_DMA_COMMAND) & _RUN:
            if watch.expired():
                return False
            time.sleep(_POLL_S)
        if self.device.is_armed():
            self._registers.write32(_IRQ_ACKNOWLEDGE, _DMA_INTERRUPT)
        return True

    def _answer(
        self, watch: Stopwatch, completed: bool, copied: int, chunks: int
    ) -> dict[str, Any]:
        status = {
            "command": self._registers.read32(_DMA_COMMAND),
            "interrupt": self._registers.read32(_IRQ_STATUS),
        }
        return self.answer(watch, completed, copied, chunks, status)
