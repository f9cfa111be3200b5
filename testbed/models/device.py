# SPDX-License-Identifier: Apache-2.0
"""The base class of every device model: subclass it, and QEMU plugs it in.

A device declares what it is (`identity`, `bars`, `msix_vectors`), answers register accesses
(:meth:`Device.read`, :meth:`Device.write`) and does its work in coroutines that it starts
(:meth:`Device.start`). While a register access is answered the guest's CPU stands still, and QEMU
serves no DMA: so `read` and `write` never wait, and whatever needs DMA is started there and runs
afterwards. All devices of a process share one thread: nothing needs a lock, and nothing may block.

`docs/examples/adder.py` is a complete device in under 60 lines, `docs/own-device.md` its manual.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import PurePath
from typing import ClassVar, Final, NamedTuple, Protocol, TypeVar

from testbed.models import wire
from testbed.models.access import AccessError, Cause, Mover, Space, Window
from testbed.models.config import Bar, ConfigSpace, Identity, MsixLayout
from testbed.models.dma import DmaTable
from testbed.models.inject import Rules
from testbed.models.interrupts import Interrupts
from testbed.models.pacing import UNTIMED, Duplex
from testbed.models.routing import Router, TableRouter
from testbed.models.witness import Event, Path, Witness

ACCESS_SIZES: Final = (1, 2, 4, 8)
PROBE_BYTES: Final = 8
PAGE_BYTES: Final = wire.PAGE_BYTES
Answer = TypeVar("Answer")


class Machine(Protocol):
    """The QEMU that a device is plugged into, as far as the device needs it."""

    max_transfer_bytes: int  # what one message may carry

    async def dma_read(self, address: int, size_bytes: int) -> bytes:
        """Read at an IOVA by message; AccessError if the machine refuses or is gone."""

    async def dma_write(self, address: int, data: bytes) -> None:
        """Write, likewise."""


class BusSpace(Space):
    """The bus above a device: switches first, then the IOMMU's mappings, then QEMU itself."""

    path = Path.IOMMU

    def __init__(self, config: ConfigSpace, router: Router) -> None:
        self.table = DmaTable()
        self.router: Router = router
        self.machine: Machine | None = None
        self.timing = UNTIMED
        self._config = config
        self._pipes = Duplex()
        # Where the latest message that QEMU carried out ended, for reads and for writes.
        self._answered = [-1, -1]

    def reach(self, address: int, size_bytes: int, *, write: bool) -> Window:
        """See :meth:`Space.reach`; NO_BUS_MASTER and DEVICE_GONE are refused here."""
        if self.machine is None:
            raise AccessError(Cause.DEVICE_GONE, address, write=write)
        if not self._config.bus_master:
            raise AccessError(Cause.NO_BUS_MASTER, address, write=write)
        routed = self.router.route(address, size_bytes)
        size = routed.size_bytes
        if routed.space is not None:
            return routed.space.reach(address, size, write=write)
        if routed.view is not None:
            return Window(size, routed.view, Path.PEER, routed.target, self, address)
        found = self.table.reach(address, size, write=write)
        mapping = found.mapping
        if found.view is not None and mapping is not None and mapping.memory is not None:
            target = mapping.memory.name
            return Window(found.size_bytes, found.view, Path.IOMMU, target, self, address)
        size = min(found.size_bytes, self.machine.max_transfer_bytes)
        if mapping is None or not (mapping.writable if write else mapping.readable):
            # Nothing is announced here: a register of another device, a mapping that QEMU keeps to
            # itself (VT-d's first stage), or a fault. It takes a refused access apart, and with
            # virtio-iommu each part is a fault of its own: a little first, then to the page's end.
            is_open = self._answered[write] == address and address % PAGE_BYTES
            step = PAGE_BYTES if is_open else PROBE_BYTES
            size = min(size, step - address % step)
        return Window(size, None, Path.MESSAGE, "", self, address)

    def book(self, window: Window, size_bytes: int, began_s: float, *, write: bool) -> float:
        """See :meth:`Space.book`."""
        timing = self.timing.of(window.path, window.target)
        return self._pipes.book(size_bytes, timing, began_s, write=write)

    async def ready(self, address: int, *, write: bool) -> None:
        """Wait until it is known how the switches stand."""
        del address, write
        if self.router.stale() and self.machine is not None and self._config.bus_master:
            await self.router.refresh()

    async def fetch(self, address: int, size_bytes: int) -> bytes:
        """Ask QEMU, as this device: its IOMMU judges, and logs a fault with this requester."""
        if self.machine is None:
            raise AccessError(Cause.DEVICE_GONE, address, write=False)
        data = await self.machine.dma_read(address, size_bytes)
        self._answered[False] = address + size_bytes
        return data

    async def store(self, address: int, data: bytes) -> None:
        """Likewise."""
        if self.machine is None:
            raise AccessError(Cause.DEVICE_GONE, address, write=True)
        await self.machine.dma_write(address, data)
        self._answered[True] = address + len(data)


class Failure(NamedTuple):
    """An exception in a model's own code: where, and what."""

    where: str
    what: str


class Device:
    """One PCI function. See the module's text for how to write one.

    Class attributes to set: ``identity``; ``bars`` (or :meth:`make_bars`); ``msix_vectors`` with
    ``msix`` saying where the table stands; ``msi_vectors``; ``intx``.
    """

    identity: ClassVar[Identity]
    bars: tuple[Bar, ...] = ()
    msix: MsixLayout | None = None
    msi_vectors: int = 0
    intx: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.witness = Witness()
        self.rules = Rules()
        self.failure: Failure | None = None
        self.config = self.make_config().seal()
        vectors = self.msix.vectors if self.msix else 0
        self.interrupts = Interrupts(intx=self.intx, msi=self.msi_vectors, msix=vectors)
        self.router = TableRouter()
        self.bus = BusSpace(self.config, self.router)
        self.mover = Mover(self.witness, self.rules)
        self.interrupts_to_lose = 0
        self._tasks: set[asyncio.Task[None]] = set()

    # --- to override

    def make_config(self) -> ConfigSpace:
        """The configuration space; extend what this answers to add capabilities."""
        config = ConfigSpace(self.identity, self.bars, intx=self.intx)
        config.add_power_management()
        if self.msi_vectors:
            config.add_msi(self.msi_vectors)
        if self.msix is not None:
            config.add_msix(self.msix)
        config.add_pcie()
        return config

    def read(self, bar: int, offset: int, size: int) -> int:  # noqa: ARG002 - for subclasses
        """A register read of 1, 2, 4 or 8 bytes, aligned to its size."""
        return 0

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """A register write, likewise. Start what takes time; do not wait for it here."""

    def reset(self) -> None:
        """Back to the state after power-on; what was started has been cancelled already."""

    async def open(self) -> None:
        """Connect to whatever else the device needs, before a machine is plugged in. OSError if it
        cannot be.
        """

    def close(self) -> None:
        """Let go of it."""

    # --- to use

    async def dma_read(self, address: int, size_bytes: int) -> bytes:
        """Read up to 16 MiB at a bus address (an IOVA); AccessError if it faults."""
        return await self.mover.read(self.bus, address, size_bytes)

    async def dma_write(self, address: int, data: bytes) -> None:
        """Write at a bus address; AccessError if it faults."""
        await self.mover.write(self.bus, address, data)

    def raise_interrupt(self, vector: int = 0) -> None:
        """Interrupt the guest."""
        if self.interrupts_to_lose:
            self.interrupts_to_lose -= 1
            self.witness.event(Event.INTERRUPT_LOST, address=vector)
            return
        delivered = self.interrupts.fire(vector)
        self.witness.event(
            Event.INTERRUPT, address=vector, detail="" if delivered else "not delivered"
        )

    def start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run a coroutine beside everything else, until it ends or the device is reset."""
        task = asyncio.get_running_loop().create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # if it was cancelled before it began
        return task

    def cancel_work(self) -> None:
        """Stop all that was started."""
        for task in self._tasks:
            task.cancel()

    # --- what the server calls

    def plug(self, machine: Machine) -> None:
        """A machine has connected."""
        self.bus.machine = machine

    def unplug(self) -> None:
        """It is gone: nothing of its memory is reachable any more; the device starts afresh."""
        self.bus.machine = None
        self.bus.table.clear()
        self.bus.router.forget()
        self.interrupts.release()
        self.function_reset()

    def function_reset(self) -> None:
        """Stop all work and begin anew; mappings and interrupt descriptors stay."""
        self.witness.event(Event.RESET)
        self.bus.router.invalidate()
        self.cancel_work()
        self.config.reset()
        self.call(self.reset)

    def region_read(self, region: int, offset: int, size: int) -> bytes:
        """The bytes at ``offset`` of a region. ValueError if there is no such place."""
        if region == wire.Region.CONFIG:
            self._within(offset, size, len(self.config.bytes))
            return self.config.read(offset, size)
        bar = self.bar(region)
        self._within(offset, size, bar.size_bytes)
        direct = bar.direct(offset, size)
        if direct is not None:
            return bytes(direct)
        layout = self.msix
        if layout is not None and region == layout.bar and offset >= layout.pending_offset:
            bits = self.interrupts.pending_bits()
            within = offset - layout.pending_offset
            if within < len(bits):
                return bits[within : within + size].ljust(size, b"\0")
        self._register(offset, size)
        value = self.call(lambda: self.read(region, offset, size), 0) or 0
        return (value % (1 << 8 * size)).to_bytes(size, "little")

    def region_write(self, region: int, offset: int, data: bytes | memoryview) -> None:
        """Write at ``offset`` of a region. ValueError if there is no such place."""
        size = len(data)
        if region == wire.Region.CONFIG:
            self._within(offset, size, len(self.config.bytes))
            self.bus.router.invalidate()
            if self.config.write(offset, data):
                self.function_reset()
            return
        bar = self.bar(region)
        self._within(offset, size, bar.size_bytes)
        direct = bar.direct(offset, size)
        if direct is not None:
            direct[:] = data
            return
        self._register(offset, size)
        value = int.from_bytes(data, "little")
        self.call(lambda: self.write(region, offset, size, value))

    def bar(self, index: int) -> Bar:
        """The BAR with that index; ValueError if there is none."""
        for bar in self.bars:
            if bar.index == index:
                return bar
        raise ValueError(f"no region {index}")

    # --- inside

    @staticmethod
    def _within(offset: int, size: int, limit: int) -> None:
        if not size or offset + size > limit:
            raise ValueError(f"{size} bytes at {offset:#x} lie outside the region")

    @staticmethod
    def _register(offset: int, size: int) -> None:
        if size not in ACCESS_SIZES or offset % size:
            raise ValueError(f"a register access of {size} bytes at {offset:#x}")

    def call(self, action: Callable[[], Answer], otherwise: Answer | None = None) -> Answer | None:
        """Run the model's own code: an exception there is this device's failure, no one else's."""
        try:
            return action()
        except Exception as error:
            self._fail(error)
            return otherwise

    async def _guard(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except AccessError as error:
            self.witness.event(Event.ACCESS_ERROR, address=error.address, detail="unhandled")
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}"
        self.failure = Failure(where, f"{type(error).__name__}: {error}")
        self.witness.event(Event.MODEL_ERROR, detail=f"{self.failure.what} at {where}")
        if self.witness.count(Event.MODEL_ERROR) == 1:
            sys.stderr.write(f"device {self.name}: {self.failure.what} (at {where})\n")
