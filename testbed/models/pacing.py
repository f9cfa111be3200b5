# SPDX-License-Identifier: Apache-2.0
"""Optional timing: what a path of some bandwidth and latency takes, so that better can be measured.

A path is two pipes, one each way, as PCIe and links have: transfers queue behind each other for
their bytes, and each arrives one latency later. It slows down, it never speeds up: what is wanted
faster than this host copies takes what memcpy takes.

Waiting costs no CPU time. A long transfer sleeps now and then, so that its bytes do not come all at
once; only the last millisecond, which the event loop's timers (epoll: whole milliseconds) are too
coarse for, is slept through by the whole process: one device.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from testbed.errors import InputError
from testbed.models.witness import Path

MAX_LATENCY_S = 1.0
COARSE_S = 0.001  # how late a timer of the event loop may be
AHEAD_S = 0.003  # how much earlier than they should bytes may be seen


@dataclass(frozen=True)
class Timing:
    """``bytes_per_s`` 0 means that only the latency counts."""

    bytes_per_s: float = 0.0
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes_per_s < 0 or not 0.0 <= self.latency_s <= MAX_LATENCY_S:
            raise InputError(
                f"timing: bytes_per_s is not negative, latency_s at most {MAX_LATENCY_S:g}"
            )

    def __bool__(self) -> bool:
        return bool(self.bytes_per_s or self.latency_s)


NO_TIMING = Timing()


@dataclass(frozen=True)
class BusTiming:
    """What the ways through the PCIe tree carry, as whoever knows the tree worked it out.

    ``memory``  to the machine's memory, and to all that is not named below.
    ``up``      to a peer's memory by way of the root complex, by the memory's name.
    ``across``  to a peer's memory below a common switch.
    """

    memory: Timing = NO_TIMING
    up: Mapping[str, Timing] = field(default_factory=dict)
    across: Mapping[str, Timing] = field(default_factory=dict)

    def of(self, path: Path, target: str) -> Timing:
        """That of an access."""
        return (self.across if path is Path.PEER else self.up).get(target, self.memory)


UNTIMED = BusTiming()


class Pipe:
    """One direction of a path: bytes that wait for their turn."""

    def __init__(self) -> None:
        self._free_at_s = 0.0

    def book(self, size_bytes: int, timing: Timing, began_s: float) -> float:
        """When ``size_bytes`` more of a transfer that began then have arrived (monotonic clock)."""
        taken_s = size_bytes / timing.bytes_per_s if timing.bytes_per_s else 0.0
        self._free_at_s = max(self._free_at_s, began_s) + taken_s
        return self._free_at_s + timing.latency_s


class Duplex:
    """Both directions: what is read comes in by one, what is written goes out by the other."""

    def __init__(self) -> None:
        self._inward = Pipe()
        self._outward = Pipe()

    def book(self, size_bytes: int, timing: Timing, began_s: float, *, write: bool) -> float:
        """See :meth:`Pipe.book`; 0.0, long ago, where nothing is timed."""
        if not timing:
            return 0.0
        pipe = self._outward if write else self._inward
        return pipe.book(size_bytes, timing, began_s)


@dataclass
class Transfer:
    """One transfer, from its first byte to its last; it may pass several paths at once."""

    began_s: float = field(default_factory=time.monotonic)
    due_s: float = 0.0  # when what was moved so far has arrived

    def passes(self, due_s: float) -> None:
        """A part of it arrives at that time, by one of its paths."""
        self.due_s = max(self.due_s, due_s)

    async def keep_pace(self) -> None:
        """Between two parts: do not run far ahead of what the path carries."""
        ahead_s = self.due_s - time.monotonic()
        if ahead_s > AHEAD_S:
            await asyncio.sleep(ahead_s - AHEAD_S + COARSE_S)

    async def end(self) -> None:
        """Wait until the last byte has arrived."""
        if not self.due_s:
            return
        left_s = self.due_s - time.monotonic()
        if left_s > COARSE_S:
            await asyncio.sleep(left_s - COARSE_S)
            left_s = self.due_s - time.monotonic()
        if left_s > 0.0:
            time.sleep(left_s)  # see the module
