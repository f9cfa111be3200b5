# SPDX-License-Identifier: Apache-2.0
"""Fences: "this work is done", promised by someone who can be named, and due at a time.

As ``struct dma_fence`` (drivers/dma-buf/dma-fence.c): a fence belongs to a context in which fences
signal in order, signals once, for good, with or without an error. What the kernel leaves to hope is
demanded here: every fence has a deadline, and whoever waits longer is told who owes it.

:class:`KeepAlive` is the fence that the 2020-10 discussion of dma_resv and ODP proposes: an
importer that has just repaired a page fault keeps the buffer busy for long enough to make use of
it, without blocking anyone's access, and for a bounded time only.
"""

from __future__ import annotations

import itertools

from guest_agent.p2p.errors import FenceFailedError, FenceTimeoutError, P2PError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.p2p.clock import Clock

_numbers = itertools.count(1)


class FenceContext:
    """A line of fences that signal in order: one engine's queue, one importer's page faults."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = next(_numbers)
        self._sequence = 0

    def next(self) -> int:
        """The next sequence number, from 1."""
        self._sequence += 1
        return self._sequence


class Fence:
    """One promise.

    :param context: whose line it is in.
    :param what: what will be done, for errors: "copy of buf0 to system memory".
    :param deadline_ns: when it is due, by the clock that waiters use.
    :param poll: asks a device whether it is done (True); may raise what went wrong.
    """

    def __init__(
        self,
        context: FenceContext,
        what: str,
        deadline_ns: int,
        poll: Callable[[], bool] | None = None,
    ) -> None:
        self.context = context
        self.sequence = context.next()
        self.what = what
        self.deadline_ns = deadline_ns
        self.error: Exception | None = None
        self._poll = poll
        self._done = False
        self._callbacks: list[Callable[[Fence], object]] = []

    def __str__(self) -> str:
        return f"fence {self.context.name}#{self.sequence} ({self.what})"

    def signal(self, error: Exception | None = None) -> None:
        """The work is done, or failed. :raises P2PError: it had signalled before."""
        if self._done:
            raise P2PError(f"{self} signals twice")
        self._done = True
        self.error = error
        self._poll = None
        callbacks, self._callbacks = self._callbacks, []
        for call in callbacks:
            call(self)

    def is_signalled(self) -> bool:
        """Whether the work is done or failed; asks the device if there is one to ask."""
        if not self._done and self._poll is not None:
            try:
                done = self._poll()
            except Exception as error:  # whatever the device's way of failing, waiters must know
                self.signal(error)
            else:
                if done and not self._done:  # asking may have signalled it
                    self.signal()
        return self._done

    def when_signalled(self, call: Callable[[Fence], object]) -> None:
        """Call when it signals; at once if it has."""
        if self._done:
            call(self)
        else:
            self._callbacks.append(call)

    def is_later_than(self, other: Fence) -> bool:
        """Whether both are of one context and this one signals after the other."""
        return self.context is other.context and self.sequence > other.sequence

    def wait_end(self, clock: Clock, until_ns: int | None = None) -> None:
        """Wait until it signals, with an error or without.

        :param until_ns: how long at most; the fence's own deadline if that is earlier or if None.
        :raises FenceTimeoutError: it did not; names the fence.
        """
        limit_ns = self.deadline_ns if until_ns is None else min(until_ns, self.deadline_ns)
        while not self.is_signalled():
            if clock.now_ns() >= limit_ns:
                raise FenceTimeoutError(f"{self} did not signal in time")
            clock.pause(limit_ns)

    def wait(self, clock: Clock, until_ns: int | None = None) -> None:
        """As :meth:`wait_end`. :raises FenceFailedError: the work failed; says how."""
        self.wait_end(clock, until_ns)
        self.check()

    def check(self) -> None:
        """:raises FenceFailedError: it has signalled with an error, which is the cause."""
        if self.error is not None:
            raise FenceFailedError(f"{self} failed: {self.error}") from self.error


class KeepAlive(Fence):
    """Keeps a buffer in place for one transfer after a page fault; ends by itself.

    It goes into the reservation as BOOKKEEP: nobody's implicit synchronisation waits for it, but
    a move does.

    :param until_ns: when it ends, whatever happens.
    """

    def __init__(self, context: FenceContext, what: str, clock: Clock, until_ns: int) -> None:
        super().__init__(context, what, until_ns, lambda: clock.now_ns() >= until_ns)
        clock.wake(until_ns)

    def release(self) -> None:
        """The transfer is through: the buffer may move."""
        if not self.is_signalled():
            self.signal()
