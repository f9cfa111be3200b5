# SPDX-License-Identifier: Apache-2.0
"""The testbed's own GPU and NIC models as copy engines; registers: docs/gpu-model.md, nic-model.md.

Both take commands from a ring in scratch memory and write a fence when one is done. Other than
QEMU's devices they are told when an access is refused: then ``completed`` is False at once, and
``status`` names the cause and the address.
"""

from __future__ import annotations

import errno
import struct
import time

from guest_agent.hw import model_registers as hw
from guest_agent.hw.engine import PAGE_BYTES, Engine, Scratch, Stopwatch, check_doorbell
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

    from guest_agent.hw.device import Device
    from guest_agent.hw.region import Region

_CELL_BYTES = 256  # the first of the scratch memory: fence, value to write, dump
_FENCE_AT = 0
_VALUE_AT = 64
_DUMP_AT = 128
_COMMAND_BYTES = hw.COMMAND_BYTES
_SPINS = 256
_STATUS_EVERY = 16  # a register costs a trap and the model's time, the fence in memory does not
_POLL_S = 0.0005
LATE = "no answer in time"
_GONE = 0xFFFFFFFF  # what a read of a register that is not there answers
_CAUSES = {
    value: name.removeprefix("CAUSE_").lower()
    for name, value in vars(hw).items()
    if name.startswith("CAUSE_")
}


class Ring(Engine):
    """What both have in common. A subclass says what one copy is."""

    kept_bytes: ClassVar[int] = 0  # at the end of the scratch memory, which the ring leaves alone
    register_set: ClassVar[int] = 0
    max_copy_bytes: ClassVar[int] = 1 << 40
    can: ClassVar[tuple[str, ...]] = ("copy", "write32", "storm", "burst")

    def __init__(self, device: Device, scratch: Scratch | None) -> None:
        super().__init__(device, scratch)
        least = PAGE_BYTES + self.kept_bytes
        if scratch is None or scratch.size_bytes < least:
            raise ParameterError(f"scratch: {self.kind} needs at least {least} bytes for its ring")
        self._is_new = device.was_reset
        self._registers: Region = device.region(hw.REGISTER_BAR)
        self._memory = scratch.region
        self._cell = scratch.offset
        self._cell_iova = scratch.iova
        room = (scratch.size_bytes - self.kept_bytes - _CELL_BYTES) // _COMMAND_BYTES
        self._entries = min(1 << (room.bit_length() - 1), hw.MAX_RING_ENTRIES)
        self._tail = 0
        self._fence = 0  # goes on over resets: a value is never used twice
        self._memory.write64(self._cell + _FENCE_AT, 0)

    def open(self) -> None:
        """Reset and set up. :raises OSError: ENODEV if the device does not answer as it should."""
        if not self._is_new:  # a function-level reset takes 0.1 s
            self.device.reset()
        self._is_new = False
        self.device.enable()
        if self._read(hw.IDENTITY) != self.register_set:
            raise OSError(errno.ENODEV, f"{self.kind} {self.device.bdf}: it does not answer")
        self._set_up()

    def _set_up(self) -> None:
        """Reset the engine, not the function, and place the ring."""
        self._write(hw.RESET, 1)
        self._write_pair(hw.RING_BASE_LOW, self._cell_iova + _CELL_BYTES)
        self._write(hw.RING_APERTURE, hw.APERTURE_SYSTEM)
        self._write(hw.RING_ENTRIES, self._entries)
        self._write(hw.INTERRUPT_ENABLE, hw.INTERRUPT_CAUSE_COMMAND | hw.INTERRUPT_CAUSE_NOTIFY)
        self._write(hw.CONTROL, hw.CONTROL_ENABLE)
        self._tail = 0

    def copy(
        self, source_iova: int, target_iova: int, size_bytes: int, timeout_s: float
    ) -> dict[str, Any]:
        """See :meth:`Engine.copy`: one command, whatever its size."""
        self.check_copy(size_bytes)
        watch = Stopwatch(timeout_s)
        self._put_copy(source_iova, target_iova, size_bytes, hw.COMMAND_FLAG_INTERRUPT)
        return self._finish(watch, size_bytes, 1)

    def write32(self, iova: int, value: int, timeout_s: float) -> dict[str, Any]:
        """See :meth:`Engine.write32`: a copy of 4 bytes from the scratch memory."""
        check_doorbell(iova, value)
        watch = Stopwatch(timeout_s)
        self._memory.write32(self._cell + _VALUE_AT, value)
        self._put_copy(self._cell_iova + _VALUE_AT, iova, 4, hw.COMMAND_FLAG_INTERRUPT)
        return self._finish(watch, 4, 1)

    def storm(self, iova: int, count: int, access: str, timeout_s: float) -> dict[str, Any]:
        """See :meth:`Engine.storm`: one command a page, each of which may fail."""
        watch = Stopwatch(timeout_s)
        started = failed = 0
        completed = True
        while completed and started < count and not watch.expired():
            batch = min(self._entries - 2, count - started)
            before = self._read(hw.COMMANDS_FAILED)
            for page in range(started, started + batch):
                self._put_one(iova + page * PAGE_BYTES, access, hw.COMMAND_FLAG_KEEP_GOING)
            self._put_nothing()
            started += batch
            completed = self._run(watch)
            failed += self._read(hw.COMMANDS_FAILED) - before
        delivered = 4 * (started - failed) * completed
        if not completed:
            self._set_up()
        return self.answer(watch, completed and not failed, delivered, started, {"failed": failed})

    def start(self, iova: int, access: str) -> None:
        """See :meth:`Engine.start`."""
        self._put_one(iova, access, hw.COMMAND_FLAG_KEEP_GOING)
        self._write(hw.DOORBELL_TAIL, self._tail)

    def settled(self, watch: Stopwatch) -> bool:
        """See :meth:`Engine.settled`."""
        while self._status() & hw.STATUS_BUSY:
            if watch.expired():
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """Stop the engine and its interrupts."""
        self._write(hw.CONTROL, 0)
        self._write(hw.INTERRUPT_ENABLE, 0)
        self._write(hw.RESET, 1)

    # --- what a subclass has

    def _command(self, source: int, target: int, size_bytes: int, flags: int) -> bytes:
        """The bytes of a command that copies, and writes the fence if ``flags`` say so."""
        raise NotImplementedError

    def _nothing(self, flags: int = 0) -> bytes:
        """A command that does nothing, and writes the fence."""
        raise NotImplementedError

    # --- the ring

    @property
    def dump_iova(self) -> int:
        """Where the device may write what nobody wants to read."""
        return self._cell_iova + _DUMP_AT

    def _read(self, register: int) -> int:
        return self._registers.read32(register)

    def _write(self, register: int, value: int) -> None:
        self._registers.write32(register, value)

    def _write_pair(self, low: int, value: int) -> None:
        self._write(low, value & 0xFFFFFFFF)
        self._write(low + 4, value >> 32)

    def _read_pair(self, low: int) -> int:
        return self._read(low) | self._read(low + 4) << 32

    def _status(self) -> int:
        """:raises OSError: ENODEV when the device is gone."""
        status = self._read(hw.STATUS)
        if status == _GONE:
            raise OSError(errno.ENODEV, f"{self.kind} {self.device.bdf}: the device is lost")
        return status

    def _put(self, command: bytes) -> None:
        self._memory.write(self._cell + _CELL_BYTES + self._tail * _COMMAND_BYTES, command)
        self._tail = (self._tail + 1) % self._entries

    def _put_copy(self, source: int, target: int, size_bytes: int, flags: int) -> None:
        self._fence += 1
        self._put(self._command(source, target, size_bytes, flags | hw.COMMAND_FLAG_FENCE))

    def _put_nothing(self) -> None:
        self._fence += 1
        self._put(self._nothing())

    def _put_one(self, iova: int, access: str, flags: int) -> None:
        ends = (iova, self.dump_iova)
        source, target = ends if access == "read" else (self._cell_iova + _VALUE_AT, iova)
        self._put(self._command(source, target, 4, flags))

    def _reached(self) -> int:
        """The value of the latest fence that the device wrote."""
        return self._memory.words64[(self._cell + _FENCE_AT) >> 3]

    def _run(self, watch: Stopwatch) -> bool:
        """Ring, and wait for the latest fence; False if the engine halts or time is over."""
        self._write(hw.DOORBELL_TAIL, self._tail)
        looks = 0
        while self._reached() != self._fence:
            looks += 1
            is_late = looks > _SPINS
            is_due = is_late or looks % _STATUS_EVERY == 0
            if is_due and (self._status() & hw.STATUS_HALTED or watch.expired()):
                return False
            if is_late:
                time.sleep(_POLL_S)
        return True

    def _finish(self, watch: Stopwatch, size_bytes: int, chunks: int) -> dict[str, Any]:
        completed = self._run(watch)
        why = {} if completed else self._why()
        if not completed:
            self._set_up()
        return self.answer(watch, completed, size_bytes * completed, chunks * completed, why)

    def _why(self) -> dict[str, Any]:
        if not self._status() & hw.STATUS_HALTED:
            return {"cause": LATE}
        cause = self._read(hw.ERROR_CAUSE)
        address = self._read_pair(hw.ERROR_ADDRESS_LOW)
        return {"cause": _CAUSES.get(cause, str(cause)), "address": address}


class Model(Ring):
    """The GPU model; scratch memory of 4 KiB or more for the ring."""

    kind: ClassVar[str] = "model"
    identity: ClassVar[tuple[int, int]] = (hw.VENDOR_ID, hw.GPU_DEVICE_ID)
    register_set: ClassVar[int] = hw.GPU_IDENTITY

    def _command(self, source: int, target: int, size_bytes: int, flags: int) -> bytes:
        return self._pack(hw.OPCODE_COPY, flags, source, target, size_bytes)

    def _nothing(self, flags: int = 0) -> bytes:
        return self._pack(hw.OPCODE_NOP, flags | hw.COMMAND_FLAG_FENCE, 0, 0, 0)

    def _pack(self, opcode: int, flags: int, source: int, target: int, size_bytes: int) -> bytes:
        system = hw.APERTURE_SYSTEM
        return struct.pack(
            hw.COMMAND_FORM,
            opcode, flags, system, system, system, 0, 0,
            source, target, size_bytes,
            0, 0, 0, self._fence, 0,
            self._cell_iova + _FENCE_AT,
        )  # fmt: skip


class ModelNic(Ring):
    """The NIC model in loopback; each copy goes between two regions that cover all addresses."""

    kind: ClassVar[str] = "model-nic"
    identity: ClassVar[tuple[int, int]] = (hw.VENDOR_ID, hw.NIC_DEVICE_ID)
    register_set: ClassVar[int] = hw.NIC_IDENTITY

    def _set_up(self) -> None:
        """Also registers the region."""
        super()._set_up()
        self._write(hw.NIC_REGION_INDEX, 0)
        self._write(
            hw.NIC_REGION_FLAGS,
            hw.REGION_FLAG_VALID
            | hw.REGION_FLAG_LOCAL_WRITE
            | hw.REGION_FLAG_REMOTE_READ
            | hw.REGION_FLAG_REMOTE_WRITE,
        )
        self._write_pair(hw.NIC_REGION_BASE_LOW, 0)
        self._write_pair(hw.NIC_REGION_SIZE_LOW, (1 << 64) - PAGE_BYTES)
        self._write_pair(hw.NIC_REGION_IOVA_LOW, 0)
        self._write(hw.NIC_REGION_COMMIT, 1)
        self._key = self._read(hw.NIC_REGION_KEY)
        self._own = self._read(hw.NIC_ADDRESS)

    def _command(self, source: int, target: int, size_bytes: int, flags: int) -> bytes:
        return self._pack(hw.NIC_OPCODE_WRITE, flags, source, target, size_bytes)

    def _nothing(self, flags: int = 0) -> bytes:
        return self._pack(hw.NIC_OPCODE_NOP, flags | hw.COMMAND_FLAG_FENCE, 0, 0, 0)

    def _pack(self, opcode: int, flags: int, source: int, target: int, size_bytes: int) -> bytes:
        return struct.pack(
            hw.WORK_REQUEST_FORM,
            opcode, flags, self._own, self._key,
            source, target, size_bytes,
            self._key, self._fence, hw.APERTURE_SYSTEM, 0,
            self._cell_iova + _FENCE_AT,
        )  # fmt: skip
