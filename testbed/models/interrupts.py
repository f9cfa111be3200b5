# SPDX-License-Identifier: Apache-2.0
"""A device's interrupts: VFIO's five kinds, signalled through the eventfds that QEMU sent.

QEMU keeps the MSI-X table and enables a vector by sending its eventfd; a vector that has none
yet, or is masked, stays pending and fires when that ends. INTx is masked by firing (QEMU unmasks
it at the next access to the device).
"""

from __future__ import annotations

import errno
import os
from typing import Final

from testbed.models.wire import IRQ_SET_FLAGS, Irq, IrqFlag, IrqSet, IrqSetFlag

# QEMU warns if it is missing; but firing it would stop the machine (vfio_err_notifier_handler).
ERR_COUNT: Final = 1
REQ_COUNT: Final = 0  # QEMU listens to it for vfio-pci only, not for vfio-user


class IrqRefused(Exception):
    """The request makes no sense; ``number`` is the errno for the reply."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class _Line:
    """One interrupt of one kind."""

    __slots__ = ("fd", "masked", "pending")

    def __init__(self) -> None:
        self.fd = -1
        self.masked = False
        self.pending = False

    def assign(self, fd: int) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = fd


class Interrupts:
    """All interrupts of one device. Owns the descriptors it was given."""

    def __init__(self, *, intx: bool, msi: int, msix: int) -> None:
        counts = {Irq.INTX: int(intx), Irq.MSI: msi, Irq.MSIX: msix, Irq.ERR: ERR_COUNT}
        counts[Irq.REQ] = REQ_COUNT
        self._lines: dict[Irq, list[_Line]] = {
            kind: [_Line() for _ in range(count)] for kind, count in counts.items()
        }

    def info(self, index: int) -> tuple[int, int]:
        """(flags, count) for DEVICE_GET_IRQ_INFO. IrqRefused if there is no such kind."""
        kind = self._kind(index)
        flags = int(IrqFlag.EVENTFD)
        if kind == Irq.INTX:
            flags |= IrqFlag.MASKABLE | IrqFlag.AUTOMASKED
        elif kind in (Irq.MSI, Irq.MSIX):
            flags |= IrqFlag.MASKABLE | IrqFlag.NORESIZE
        return flags, len(self._lines[kind])

    def set(self, request: IrqSet, data: memoryview, fds: list[int]) -> None:
        """Carry out DEVICE_SET_IRQS, taking the descriptors it uses out of ``fds``.

        IrqRefused with EINVAL if the request is not of the protocol's form or out of range.
        """
        lines = self._lines[self._kind(request.irq)]
        kind = request.flags & IrqSetFlag.DATA
        action = request.flags & IrqSetFlag.ACTION
        end = request.start + request.amount
        if request.flags & ~IRQ_SET_FLAGS or end > len(lines):
            raise IrqRefused(errno.EINVAL)
        if not request.amount:
            if request.start or kind != IrqSetFlag.DATA_NONE or action != IrqSetFlag.ACTION_TRIGGER:
                raise IrqRefused(errno.EINVAL)
            self._release(lines)
            return
        chosen = lines[request.start : end]
        if kind == IrqSetFlag.DATA_EVENTFD:
            self._assign(chosen, action, fds)
            return
        if kind == IrqSetFlag.DATA_BOOL:
            if len(data) != request.amount:
                raise IrqRefused(errno.EINVAL)
            chosen = [line for line, wanted in zip(chosen, data, strict=True) if wanted]
        elif kind != IrqSetFlag.DATA_NONE:
            raise IrqRefused(errno.EINVAL)
        for line in chosen:
            self._act(line, action)

    def fire(self, vector: int) -> bool:
        """Raise an interrupt: MSI-X vector, MSI vector or INTx, whichever the guest has enabled
        (with fewer vectors than asked for, the last one stands in). True if it was delivered;
        False if it stays pending, or is lost because the guest enabled none.
        """
        for kind in (Irq.MSIX, Irq.MSI, Irq.INTX):
            lines = self._lines[kind]
            if any(line.fd >= 0 for line in lines):
                line = lines[min(vector, len(lines) - 1)]
                delivered = self._signal(line)
                if kind == Irq.INTX and delivered:
                    line.masked = True
                return delivered
        return False

    def pending_bits(self) -> bytes:
        """The MSI-X pending bit array."""
        lines = self._lines[Irq.MSIX]
        bits = sum(1 << number for number, line in enumerate(lines) if line.pending)
        return bits.to_bytes((len(lines) + 63) // 64 * 8, "little")

    def release(self) -> None:
        """Close every descriptor and forget what was pending or masked."""
        for lines in self._lines.values():
            self._release(lines)

    def _kind(self, index: int) -> Irq:
        try:
            return Irq(index)
        except ValueError:
            raise IrqRefused(errno.EINVAL) from None

    @staticmethod
    def _release(lines: list[_Line]) -> None:
        for line in lines:
            line.assign(-1)
            line.masked = line.pending = False

    def _assign(self, lines: list[_Line], action: int, fds: list[int]) -> None:
        # Descriptors to be told of masking are of no use to anyone here.
        if action != IrqSetFlag.ACTION_TRIGGER or len(fds) not in (0, len(lines)):
            raise IrqRefused(errno.EINVAL)
        for line in lines:
            if not fds:
                line.assign(-1)
                continue
            fd = fds.pop(0)
            os.set_blocking(fd, False)
            line.assign(fd)
            if line.pending and not line.masked:
                self._signal(line)

    def _act(self, line: _Line, action: int) -> None:
        if action == IrqSetFlag.ACTION_MASK:
            line.masked = True
        elif action == IrqSetFlag.ACTION_UNMASK:
            line.masked = False
            if line.pending:
                self._signal(line)
        elif action == IrqSetFlag.ACTION_TRIGGER:
            self._signal(line)
        else:
            raise IrqRefused(errno.EINVAL)

    @staticmethod
    def _signal(line: _Line) -> bool:
        line.pending = line.fd < 0 or line.masked
        if line.pending:
            return False
        try:
            os.write(line.fd, (1).to_bytes(8, "little"))
        except OSError:  # no eventfd, or one that is full: the other side's own fault
            return False
        return True
