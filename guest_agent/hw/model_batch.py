# SPDX-License-Identifier: Apache-2.0
"""What the rich drivers of the GPU and NIC models share: batches of commands, and page faults.

A batch is put into the ring at once and ends in a fence of its own, so that several can be under
way while the caller does something else: answer the page faults of one of them, for instance.
"""

from __future__ import annotations

import errno
import time

from guest_agent.hw import model_registers as hw
from guest_agent.hw.engine import Stopwatch
from guest_agent.hw.fault_buffer import ENTRIES
from guest_agent.hw.model import LATE, Ring
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from guest_agent.hw.device import Device
    from guest_agent.hw.engine import Scratch
    from guest_agent.hw.fault_buffer import FaultBuffer

COMMAND_VECTOR, ERROR_VECTOR, FAULT_VECTOR, LINK_VECTOR = range(4)  # docs/gpu-model.md
WAYS = ("poll", "interrupt")
MAX_UNCLAIMED = 1024
_CAUSES = (
    hw.INTERRUPT_CAUSE_COMMAND
    | hw.INTERRUPT_CAUSE_ERROR
    | hw.INTERRUPT_CAUSE_PAGE_FAULT
    | hw.INTERRUPT_CAUSE_LINK
    | hw.INTERRUPT_CAUSE_NOTIFY
)
SLICE_S = 0.25  # a lost device raises no interrupt: look at it that often
_SPINS = 64
_NAP_S = 0.0005
_FLAGS_AT = hw.COMMAND_FLAGS_AT  # the same in a work request
_STATUS_EVERY = 16  # a register costs a trap; memory does not


def check_way(by: str) -> None:
    """:raises ParameterError: neither poll nor interrupt."""
    if by not in WAYS:
        raise ParameterError(f"by: {by!r} is neither poll nor interrupt")


class _Batch:
    """One batch that was put into the ring."""

    def __init__(self, watch: Stopwatch, failed_before: int | None) -> None:
        self.watch = watch
        self.failed_before = failed_before  # None: no command of it keeps going
        self.lost: dict[str, Any] | None = None  # why it will never end


class Batches(Ring):
    """A ring with batches and page faults; a subclass has a fault buffer."""

    faults: FaultBuffer

    def __init__(self, device: Device, scratch: Scratch | None) -> None:
        super().__init__(device, scratch)
        self._batches: dict[int, _Batch] = {}
        self._free = self._entries - 1
        self._armed = False

    # --- batches

    def submit(self, commands: list[bytes], by: str) -> int:
        """Put commands into the ring, and a fence behind them; returns the batch's number.

        :param by: ``interrupt``: vector 0 fires at the end.
        :raises ParameterError: more commands than the ring has room for, ever.
        :raises OSError: EAGAIN: the ring is full now, or too many batches were not waited for.
        """
        check_way(by)
        if by == "interrupt":
            self.arm()
        self._make_room(len(commands) + 1)
        if len(self._batches) >= MAX_UNCLAIMED:
            raise OSError(errno.EAGAIN, f"{MAX_UNCLAIMED} batches were not waited for")
        keeps = any(command[_FLAGS_AT] & hw.COMMAND_FLAG_KEEP_GOING for command in commands)
        batch = _Batch(Stopwatch(0), self._failed() if keeps else None)
        for command in commands:
            self._put(command)
        self._put_end(by)
        self._batches[self._fence] = batch
        self._write(hw.DOORBELL_TAIL, self._tail)
        return self._fence

    def wait(self, number: int, timeout_s: float, by: str) -> dict[str, Any]:
        """``{batch, completed, ended, elapsed_ns, failed, status}``.

        ``ended`` is False when the time was over first: it can be waited for again. When a command
        fails, the engine is reset, which is the end of all batches; ``status`` says what failed.
        ``failed`` counts the commands of the batch that were to keep going and failed.
        """
        check_way(by)
        batch = self._batches.get(number)
        if batch is None:
            raise ParameterError(f"batch: {number} is not under way")
        if by == "interrupt":
            self.arm()
        watch = Stopwatch(timeout_s)
        vectors = (COMMAND_VECTOR, ERROR_VECTOR)
        if batch.lost is None:
            self._until(lambda: self._reached() >= number, vectors, watch, by)
        completed = batch.lost is None and self._reached() >= number
        elapsed_ns = batch.watch.elapsed_ns()
        failed = 0
        if completed and batch.failed_before is not None:
            failed = self._failed() - batch.failed_before
        status: dict[str, Any] = {}
        if not completed:
            status = batch.lost or self._why()
            if batch.lost is None and status["cause"] != LATE:
                self._set_up()
        ended = completed or status["cause"] != LATE
        if ended:
            del self._batches[number]
        return {
            "batch": number,
            "completed": completed,
            "ended": ended,
            "elapsed_ns": elapsed_ns,
            "failed": failed,
            "status": status,
        }

    def reset_engine(self) -> None:
        """Stop whatever is under way. Page tables, spaces and regions are kept."""
        self._set_up()

    def arm(self) -> None:
        """Have all four vectors counted. :raises OSError: ENOTSUP where there are no interrupts."""
        if not self._armed:
            for vector in (LINK_VECTOR, FAULT_VECTOR, ERROR_VECTOR, COMMAND_VECTOR):
                self.device.arm("msix", vector)
            self._armed = True
            self._write(hw.INTERRUPT_ENABLE, _CAUSES)

    def _set_up(self) -> None:
        """Also the end of every batch that has not reached its fence."""
        reached = self._reached()
        for number, batch in self._batches.items():
            if number > reached and batch.lost is None:
                batch.lost = {"cause": "reset"}
        super()._set_up()
        self._free = self._entries - 1
        if self._armed:
            self._write(hw.INTERRUPT_ENABLE, _CAUSES)

    def _put(self, command: bytes) -> None:
        if self._free <= 0:  # :meth:`copy` and its like do not ask for room before
            self._make_room(1)
        super()._put(command)
        self._free -= 1

    def _put_end(self, by: str) -> None:
        self._fence += 1
        self._put(self._nothing(hw.COMMAND_FLAG_INTERRUPT if by == "interrupt" else 0))

    def _make_room(self, count: int) -> None:
        if count >= self._entries:
            raise ParameterError(f"commands: at most {self._entries - 2} at once, not {count - 1}")
        if count > self._free:
            under_way = (self._tail - self._read(hw.RING_HEAD)) % self._entries
            self._free = self._entries - 1 - under_way
        if count > self._free:
            raise OSError(errno.EAGAIN, f"the ring has room for {self._free} commands now")

    def _failed(self) -> int:
        return self._read(hw.COMMANDS_FAILED)

    def _until(
        self, done: Callable[[], bool], vectors: tuple[int, ...], watch: Stopwatch, by: str
    ) -> bool:
        """Wait until ``done``; False if the engine halts, or the time is over.

        :raises OSError: ENODEV when the device is gone.
        """
        looks = 0
        while not done():
            looks += 1
            if by == "interrupt":
                fired = self.device.wait_any(vectors, min(SLICE_S, watch.left_s()))
                look = ERROR_VECTOR in fired or not fired
            else:
                look = looks % _STATUS_EVERY == 0
                if looks > _SPINS:
                    time.sleep(_NAP_S)
            if look and self._status() & hw.STATUS_HALTED:
                return done()
            if watch.expired():
                return done()
        return True

    # --- page faults

    def wait_faults(self, timeout_s: float, by: str) -> dict[str, Any]:
        """Take the records out of the fault buffer; waits for one at most ``timeout_s``.

        ``{faults: [{address, write, cause, command, time_ns}], lost, waiting}``; ``time_ns`` is on
        the device's clock; ``waiting``: an access waits for :meth:`replay`.
        """
        check_way(by)
        if by == "interrupt":
            self.arm()
        watch = Stopwatch(timeout_s)
        self._until(self.faults.has_record, (FAULT_VECTOR, ERROR_VECTOR), watch, by)
        records = self.faults.take_all()
        self._write(hw.FAULT_GET, self.faults.next)
        return {
            "faults": records,
            "lost": self._read(hw.FAULT_LOST),
            "waiting": bool(self._status() & hw.STATUS_FAULTED),
        }

    def replay(self, *, cancel: bool) -> None:
        """Let what waits try again, or fail it."""
        self._write(hw.FAULT_REPLAY, hw.REPLAY_CANCEL if cancel else hw.REPLAY_AGAIN)

    def _set_up_faults(self, at: int) -> None:
        """Have the device write its fault records there from now on."""
        self.faults.clear()
        self._write_pair(hw.FAULT_BUFFER_LOW, at)
        self._write(hw.FAULT_ENTRIES, ENTRIES)
        self._write(hw.FAULT_GET, 0)

    def touch_all(
        self, commands: Iterable[bytes], service: Callable[[int], None], timeout_s: float, by: str
    ) -> dict[str, list[int]]:
        """:meth:`touch` with each: ``{seen_ns, serviced_ns, done_ns}``."""
        if by == "interrupt":
            self.arm()
        watch = Stopwatch(timeout_s)
        samples = [self.touch(command, service, watch, by) for command in commands]
        names = ("seen_ns", "serviced_ns", "done_ns")
        return {name: [sample[at] for sample in samples] for at, name in enumerate(names)}

    def touch(
        self, command: bytes, service: Callable[[int], None], watch: Stopwatch, by: str
    ) -> tuple[int, int, int]:
        """Run a command that faults once, and answer the fault with ``service(address)``.

        Returns nanoseconds: doorbell → the record is seen, → serviced and replayed, → done.

        :raises OSError: EIO: no fault, another one, or the command failed; ETIMEDOUT.
        """
        self._make_room(2)
        self._put(command)
        self._put_end(by)
        fence = self._fence
        begin = time.monotonic_ns()
        self._write(hw.DOORBELL_TAIL, self._tail)
        self._until(
            lambda: self.faults.has_record() or self._reached() >= fence,
            (FAULT_VECTOR, ERROR_VECTOR, COMMAND_VECTOR),
            watch,
            by,
        )
        seen = time.monotonic_ns()
        if not self.faults.has_record():
            raise self._no_fault(fence)
        service(self.faults.take())
        self._write(hw.FAULT_GET, self.faults.next)
        self._write(hw.FAULT_REPLAY, hw.REPLAY_AGAIN)
        replayed = time.monotonic_ns()
        self._until(
            lambda: self._reached() >= fence or self.faults.has_record(),
            (COMMAND_VECTOR, ERROR_VECTOR, FAULT_VECTOR),
            watch,
            by,
        )
        done = time.monotonic_ns()
        if self._reached() < fence:
            raise self._no_fault(fence)
        return seen - begin, replayed - seen, done - replayed

    def _no_fault(self, fence: int) -> OSError:
        """What to raise when a touch did not go as it should; the engine is usable again."""
        if self._reached() >= fence:
            return OSError(errno.EIO, "the access was done without a fault: its page was there")
        if self.faults.has_record():
            why = "the page faulted again although it was mapped"
        else:
            why = str(self._why())
        self._set_up()
        return OSError(errno.EIO, f"a touched page: {why}")
