# SPDX-License-Identifier: Apache-2.0
"""A GPU that moves its buffers all the time, against an importer with page faults (FLT-03).

A model in simulated time, on the real buffers, fences and reservations. It measures how much the
importer gets through, and :attr:`Setup.floor` says what it must get through at least when its fault
handler installs keep-alive fences. Without them the floor is 0, and that is what is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from guest_agent.p2p.interconnect import Placement
from guest_agent.p2p.resv import locked
from guest_agent.p2p.rules import Task

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from guest_agent.p2p.buffer import Buffer
    from guest_agent.p2p.clock import ManualClock
    from guest_agent.p2p.odp import OnDemand


@dataclass(frozen=True)
class Setup:
    """The times, in nanoseconds.

    ``move_gap_ns``    from the end of one move to the wish for the next.
    ``copy_ns``        what a move's copy takes.
    ``fault_ns``       from a fault to the device's next try.
    ``piece_ns``       one piece of a transfer.
    ``pieces``         of one transfer.
    ``keep_alive_ns``  how long a fault keeps the buffer in place; 0: no keep-alive fences.
    ``run_ns``         how long all of it runs.
    """

    move_gap_ns: int
    copy_ns: int
    fault_ns: int
    piece_ns: int
    pieces: int
    keep_alive_ns: int
    run_ns: int

    @property
    def rounds(self) -> int:
        """How many rounds of fault, transfer and move there are at least."""
        round_ns = (
            self.fault_ns + self.keep_alive_ns + self.piece_ns + self.move_gap_ns + 2 * self.copy_ns
        )
        return max(self.run_ns // round_ns - 1, 0)

    @property
    def pieces_per_fault(self) -> int:
        """How many pieces a fault is sure to be followed by.

        A piece that ends at the very time at which the fence does is too late.
        """
        useful_ns = max(self.keep_alive_ns - self.fault_ns - 1, 0)
        return min(useful_ns // self.piece_ns, self.pieces)

    @property
    def floor(self) -> int:
        """How many pieces must be through at the end, whatever the mover does."""
        return self.rounds * self.pieces_per_fault


@dataclass(frozen=True)
class Result:
    """What came of it. ``longest_wait_ns`` is the longest time without a piece."""

    pieces: int
    moves: int
    faults: int
    longest_wait_ns: int


def run_churn(clock: ManualClock, buffer: Buffer, importer: OnDemand, setup: Setup) -> Result:
    """Run both sides for ``setup.run_ns`` and count.

    :param importer: made with ``setup.keep_alive_ns``.
    """
    end_ns = clock.now_ns() + setup.run_ns
    moved = _mover(buffer, clock, setup, end_ns)
    pieces = 0
    longest_ns = 0
    last_ns = clock.now_ns()
    piece_bytes = -(-buffer.size_bytes // setup.pieces)
    steps = _transfers(importer, buffer.size_bytes, piece_bytes)
    while clock.now_ns() < end_ns:
        if importer.is_mapped:
            _pass(clock, setup.piece_ns, buffer)  # the device needs the entry all that time
        if next(steps):
            longest_ns = max(longest_ns, clock.now_ns() - last_ns)
            last_ns = clock.now_ns()
            pieces += 1
        else:
            _pass(clock, setup.fault_ns, buffer)
    longest_ns = max(longest_ns, clock.now_ns() - last_ns)
    return Result(pieces, len(moved), importer.counters.faults, longest_ns)


def _transfers(importer: OnDemand, size_bytes: int, piece_bytes: int) -> Iterator[bytes]:
    """One transfer of the whole buffer after another."""
    while True:
        yield from importer.steps(0, size_bytes, piece_bytes)


def _pass(clock: ManualClock, delay_ns: int, buffer: Buffer) -> None:
    """Let time pass, with everything that falls due in it."""
    until_ns = clock.now_ns() + delay_ns
    while clock.now_ns() < until_ns:
        clock.pause(until_ns)
        buffer.core.graph.pump()


def _mover(buffer: Buffer, clock: ManualClock, setup: Setup, end_ns: int) -> list[int]:
    """The GPU's side: wishes for a move as soon as the gap after the last one is over."""
    task = Task("mover")
    moved: list[int] = []

    def wish() -> None:
        if clock.now_ns() >= end_ns:
            return
        if buffer.resv.holder is not None:  # the fault handler has it: at the next opportunity
            clock.after(setup.piece_ns, wish)
            return
        other = Placement.SYSTEM if buffer.placement is Placement.DEVICE else Placement.DEVICE
        with locked(task, buffer.resv):
            fence = buffer.move(task, other)
        fence.when_signalled(done)

    def done(_: object) -> None:
        moved.append(clock.now_ns())
        clock.after(setup.move_gap_ns, wish)

    clock.after(0, wish)
    return moved
