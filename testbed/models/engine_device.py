# SPDX-License-Identifier: Apache-2.0
"""What the GPU and the NIC have in common: a register file, interrupts by cause, a command ring,
doorbells and a fault buffer. Registers: :class:`testbed.models.registers.Common`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, Final, Generic

from testbed.models import registers as hw
from testbed.models.access import Space
from testbed.models.config import Bar, ConfigSpace, MsixLayout
from testbed.models.device import Device
from testbed.models.faulting import FaultUnit
from testbed.models.registers import Common
from testbed.models.ring import Record, Ring
from testbed.models.tables import RecordLayout
from testbed.models.witness import Event

LOW: Final = 0xFFFFFFFF
_RING = (Common.RING_BASE_LOW, Common.RING_BASE_HIGH, Common.RING_APERTURE, Common.RING_ENTRIES)
_FAULTS = (
    Common.FAULT_BUFFER_LOW,
    Common.FAULT_BUFFER_HIGH,
    Common.FAULT_ENTRIES,
    Common.FAULT_GET,
)


class EngineDevice(Device, ABC, Generic[Record]):
    """Base of both. A subclass adds its registers and carries out its commands."""

    identity_word: ClassVar[int]
    bars = (Bar(hw.REGISTER_BAR, hw.REGISTER_BAR_BYTES),)
    msix: MsixLayout | None = MsixLayout(
        hw.MSIX_VECTORS, hw.REGISTER_BAR, hw.MSIX_TABLE_OFFSET, hw.MSIX_PENDING_OFFSET
    )

    def __init__(
        self,
        name: str,
        layout: RecordLayout[Record],
        fault_space: Space | None,
        *,
        msi: bool = False,
    ) -> None:
        """``fault_space`` holds the fault buffer; None for the bus.

        ``msi``: with MSI instead of MSI-X. QEMU 11.1 cannot unplug a vfio-user device with MSI-X
        (it asserts in memory_region_del_subregion); one with MSI it can.
        """
        if msi:
            self.msix, self.msi_vectors = None, hw.MSIX_VECTORS
        super().__init__(name)
        self.ring = Ring(
            self.mover,
            self.witness,
            layout,
            space=self.space,
            execute=self.execute,
            interrupt=self.interrupt,
        )
        self.faults = FaultUnit(
            self.mover,
            fault_space or self.bus,
            self.witness,
            lambda: self.interrupt(hw.InterruptCause.PAGE_FAULT),
        )
        self.doorbells_to_lose = 0
        self._stored: dict[int, int] = {}
        self._cause = 0
        self._notified = 0
        self.readers = self._make_readers()
        self.writers = self._make_writers()

    # --- for subclasses

    @abstractmethod
    def space(self, aperture: int) -> Space | None:
        """The space that an aperture byte of a command stands for."""

    @abstractmethod
    async def execute(self, command: Record) -> bool:
        """Carry out a command, but for its fence; False if it makes no sense. AccessError halts."""

    def reset_engine(self) -> None:
        """What the RESET register does; a subclass adds its part."""
        self.cancel_work()
        self.ring.reset()
        self.faults.reset()
        self.forget((Common.CONTROL, *_RING, *_FAULTS))

    def interrupt(self, cause: hw.InterruptCause) -> None:
        """Note a cause, and interrupt if it is enabled."""
        self._cause |= cause
        if self.stored(Common.INTERRUPT_ENABLE) & cause:
            self._fire(cause)

    def stored(self, register: int) -> int:
        """What was last written to a register that keeps its value."""
        return self._stored.get(register, 0)

    def stored_pair(self, low: int) -> int:
        """Likewise, of 64 bits."""
        return self.stored(low) | self.stored(low + 4) << 32

    def store(self, register: int, value: int) -> None:
        """Keep a value."""
        self._stored[register] = value

    def forget(self, registers: Iterable[int]) -> None:
        """Back to 0."""
        for register in registers:
            self._stored.pop(register, None)

    def storing(
        self, registers: Iterable[int], then: Callable[[], None] = lambda: None
    ) -> dict[int, Callable[[int], None]]:
        """Writers of registers that keep their value, and what is done when one is written."""

        def writer(register: int) -> Callable[[int], None]:
            def write(value: int) -> None:
                self._stored[register] = value
                then()

            return write

        return {register: writer(register) for register in registers}

    # --- the device

    def make_config(self) -> ConfigSpace:
        """Adds a vendor capability that names the register set, and error reporting."""
        config = super().make_config()
        config.add_vendor(self.identity_word.to_bytes(4, "little"))
        config.add_error_reporting()
        return config

    def read(self, bar: int, offset: int, size: int) -> int:
        """A register read; registers have 32 bits, other sizes are made of them."""
        del bar  # there is one
        if size == 8:
            return self.read_word(offset) | self.read_word(offset + 4) << 32
        return self.read_word(offset & ~3) >> 8 * (offset & 3)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """A register write of 4 or 8 bytes; smaller ones have no effect."""
        del bar
        if size == 8:
            self.write_word(offset, value & LOW)
            self.write_word(offset + 4, value >> 32)
        elif size == 4:
            self.write_word(offset, value)

    def read_word(self, offset: int) -> int:
        """A register's value; 0 where there is none."""
        reader = self.readers.get(offset)
        return reader() & LOW if reader else self.stored(offset)

    def write_word(self, offset: int, value: int) -> None:
        """Write a register; nothing happens where there is none."""
        writer = self.writers.get(offset)
        if writer is not None:
            writer(value)

    def reset(self) -> None:
        """As after power-on."""
        self.reset_engine()
        self._stored.clear()
        self._cause = self._notified = 0

    def _make_readers(self) -> dict[int, Callable[[], int]]:
        ring, faults = self.ring, self.faults
        return {
            Common.IDENTITY: lambda: self.identity_word,
            Common.VERSION: lambda: hw.REGISTERS_VERSION,
            Common.STATUS: self._status,
            Common.NOTIFIED: lambda: self._notified,
            Common.INTERRUPT_CAUSE: lambda: self._cause,
            Common.RING_HEAD: lambda: ring.head,
            Common.RING_TAIL: lambda: ring.tail,
            Common.ERROR_CAUSE: lambda: ring.error.cause if ring.error else 0,
            Common.ERROR_COMMAND: lambda: ring.error_command,
            Common.ERROR_ADDRESS_LOW: lambda: ring.error.address if ring.error else 0,
            Common.ERROR_ADDRESS_HIGH: lambda: ring.error.address >> 32 if ring.error else 0,
            Common.FAULT_PUT: lambda: faults.put,
            Common.FAULT_LOST: lambda: faults.lost,
            Common.COMMANDS_DONE: lambda: ring.done,
            Common.PAGE_FAULTS: lambda: faults.total,
            Common.COMMANDS_FAILED: lambda: ring.failed,
        }

    def _make_writers(self) -> dict[int, Callable[[int], None]]:
        return {
            Common.RESET: lambda _value: self.reset_engine(),
            Common.INTERRUPT_CAUSE: self._clear_cause,
            Common.INTERRUPT_ENABLE: self._enable_causes,
            Common.FAULT_REPLAY: self._replay,
            Common.DOORBELL_TAIL: self._ring_doorbell,
            Common.DOORBELL_NOTIFY: self._notify,
            **self.storing((Common.CONTROL,), self._run),
            **self.storing(_RING, self._place_ring),
            **self.storing(_FAULTS, self._place_faults),
        }

    def _status(self) -> int:
        return (
            (hw.Status.BUSY if self.ring.busy else 0)
            | (hw.Status.FAULTED if self.faults.waiting else 0)
            | (hw.Status.HALTED if self.ring.error else 0)
        )

    def _fire(self, causes: int) -> None:
        for cause in hw.InterruptCause:
            if causes & cause:
                vector = 0 if cause is hw.InterruptCause.NOTIFY else cause.bit_length() - 1
                self.raise_interrupt(vector)

    def _clear_cause(self, value: int) -> None:
        self._cause &= ~value

    def _enable_causes(self, value: int) -> None:
        before = self.stored(Common.INTERRUPT_ENABLE)
        self.store(Common.INTERRUPT_ENABLE, value)
        self._fire(self._cause & value & ~before)

    def _place_ring(self) -> None:
        if not self.ring.busy:  # otherwise it takes effect with the next write after it has stopped
            base = self.stored_pair(Common.RING_BASE_LOW)
            aperture = self.stored(Common.RING_APERTURE)
            self.ring.place(base, aperture, self.stored(Common.RING_ENTRIES))

    def _place_faults(self) -> None:
        self.faults.base = self.stored_pair(Common.FAULT_BUFFER_LOW)
        self.faults.entries = self.stored(Common.FAULT_ENTRIES)
        self.faults.get = self.stored(Common.FAULT_GET)

    def _replay(self, value: int) -> None:
        if value in (hw.Replay.AGAIN, hw.Replay.CANCEL):
            self.faults.replay(hw.Replay.of(value))

    def _ring_doorbell(self, value: int) -> None:
        if self._lose_doorbell(value):
            return
        self.witness.event(Event.DOORBELL, address=value)
        if self.ring.entries:
            self.ring.tail = value % self.ring.entries
            self._run()

    def _notify(self, value: int) -> None:
        if self._lose_doorbell(value):
            return
        self.witness.event(Event.DOORBELL, address=value, detail="notify")
        self._notified = value
        self.interrupt(hw.InterruptCause.NOTIFY)

    def _lose_doorbell(self, value: int) -> bool:
        if not self.doorbells_to_lose:
            return False
        self.doorbells_to_lose -= 1
        self.witness.event(Event.DOORBELL_LOST, address=value)
        return True

    def _run(self) -> None:
        if self.stored(Common.CONTROL) & hw.Control.ENABLE and self.ring.has_work:
            self.ring.busy = True
            self.start(self.ring.run())
