# SPDX-License-Identifier: Apache-2.0
"""The reservation object: a lock, and the fences of everyone who uses the memory.

As ``struct dma_resv`` (include/linux/dma-resv.h, drivers/dma-buf/dma-resv.c). The locking rules are
checked at each call, and several reservations are locked without deadlock as the kernel does it:
wait-die, a younger acquire context that meets an older one gives back all it has and starts again
(Documentation/locking/ww-mutex-design.rst; ``DEFINE_WD_CLASS(reservation_ww_class)``).
"""

from __future__ import annotations

import contextlib
import enum
import itertools

from guest_agent.p2p import rules
from guest_agent.p2p.errors import LockBusyError, P2PError, RuleError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guest_agent.p2p.clock import Clock
    from guest_agent.p2p.fence import Fence
    from guest_agent.p2p.rules import Task


class Usage(enum.IntEnum):
    """What a fence is there for. Asking for one usage gives the lower ones too.

    KERNEL: memory management moves or clears the bytes, everyone waits. WRITE, READ: implicit
    synchronisation. BOOKKEEP: no implicit synchronisation, but the memory must not move yet.
    """

    KERNEL = 0
    WRITE = 1
    READ = 2
    BOOKKEEP = 3

    @classmethod
    def to_wait_for(cls, write: bool) -> Usage:
        """What an access waits for (``dma_resv_usage_rw``): a writer waits for readers too."""
        return cls.READ if write else cls.WRITE


class Reservation:
    """Lock and fences of one buffer, or of several that share it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.holder: Acquire | None = None
        self._fences: list[tuple[Fence, Usage]] = []
        self._room = 0

    def reserve(self, task: Task, count: int = 1) -> None:
        """Make room for fences, which may fail, before the work is begun, which may not.

        :raises RuleError: the lock is not held.
        """
        task.must_hold(self, rules.FENCE_LOCKED, "reserve")
        self._drop_signalled()
        self._room = max(self._room, count)

    def add(self, task: Task, fence: Fence, usage: Usage) -> None:
        """Publish a fence. An earlier one of its context and of no stronger usage is replaced.

        A fence that is in it already is promoted, never degraded.

        :raises RuleError: the lock is not held, or no room was reserved.
        """
        task.must_hold(self, rules.FENCE_LOCKED, "add a fence")
        if self._room == 0:
            raise RuleError(rules.RESERVED_FIRST, f"{task.name} adds {fence} to {self.name}")
        self._room -= 1
        kept = []
        for old, old_usage in self._fences:
            if old is fence:
                usage = min(usage, old_usage)
            elif not (old.is_signalled() or (fence.is_later_than(old) and old_usage >= usage)):
                kept.append((old, old_usage))
        kept.append((fence, usage))
        self._fences = kept

    def fences(self, usage: Usage) -> list[Fence]:
        """Those that have not signalled, of this usage and the lower ones."""
        return [fence for fence, its in self._fences if its <= usage and not fence.is_signalled()]

    def is_idle(self, usage: Usage) -> bool:
        """Whether nothing of this usage or a lower one is under way."""
        return not self.fences(usage)

    def wait(self, clock: Clock, usage: Usage, until_ns: int | None = None) -> None:
        """Wait for all fences of this usage and the lower ones to end, well or not.

        :raises FenceTimeoutError: one did not signal in time.
        """
        for fence in self.fences(usage):
            fence.wait_end(clock, until_ns)

    def _drop_signalled(self) -> None:
        self._fences = [entry for entry in self._fences if not entry[0].is_signalled()]

    def __len__(self) -> int:
        """How many fences are kept, signalled or not."""
        return len(self._fences)


_stamps = itertools.count(1)


class Acquire:
    """An acquire context (``struct ww_acquire_ctx``): an age, and the locks taken through it.

    :raises RuleError: the task holds a lock through another context, or is on the way to
        signalling a fence.
    """

    def __init__(self, task: Task) -> None:
        task.must_not_be_in("fence signalling", rules.SIGNALLING, "lock a reservation")
        if task.held:
            raise RuleError(rules.ONE_CONTEXT, f"{task.name} begins a second acquire context")
        self.task = task
        self.stamp = next(_stamps)
        self.held: list[Reservation] = []

    def steps(self, reservations: Sequence[Reservation]) -> Iterator[Reservation]:
        """Lock all of them; yields each time it has to wait, with the one that it waits for.

        The caller resumes it when something was unlocked. It cannot deadlock, in whatever order
        the reservations are given: a context waits while holding locks only for a younger one.

        :raises P2PError: the context has locks already; they would be given back on the way.
        """
        wanted = list(dict.fromkeys(reservations))
        if self.held:
            raise P2PError(f"{self.task.name} must lock all of its reservations at once")
        first: Reservation | None = None
        while True:
            lost_to = None
            for each in sorted(wanted, key=lambda one: one is not first):
                while each.holder is not None and (each.holder.stamp > self.stamp or not self.held):
                    yield each
                if each.holder is not None:
                    lost_to = each
                    break
                each.holder = self
                self.held.append(each)
                self.task.held[id(each)] = each
            if lost_to is None:
                return
            self.release()
            first = lost_to

    def release(self) -> None:
        """Unlock everything that was taken through this context."""
        for each in self.held:
            each.holder = None
            del self.task.held[id(each)]
        self.held.clear()


@contextlib.contextmanager
def locked(task: Task, *reservations: Reservation) -> Iterator[Acquire]:
    """Lock one or several reservations for a block.

    :raises LockBusyError: another task holds one; names both. Whoever runs several tasks at once
        drives :meth:`Acquire.steps` instead.
    :raises RuleError: see :class:`Acquire`.
    """
    context = Acquire(task)
    try:
        for blocked in context.steps(reservations):
            owner = blocked.holder.task.name if blocked.holder else "nobody"
            raise LockBusyError(f"{task.name} wants {blocked.name}, which {owner} has locked")
        yield context
    finally:
        context.release()
