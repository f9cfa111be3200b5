# SPDX-License-Identifier: Apache-2.0
"""Operations that wait for one another: a graph without cycles, run as it becomes possible.

The 2020-10 discussion of dma_resv and ODP: "all this makes a graph of operations, can't start the
next one until all deps are finished. Actually sounds a lot like futures." An operation here is
begun when the fences that it waits for have signalled, and not before; one that would wait for
itself is refused; one that needs what a predecessor failed to make fails without having begun.
"""

from __future__ import annotations

from guest_agent.p2p.errors import CycleError, FenceFailedError, P2PError
from guest_agent.p2p.fence import Fence, FenceContext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from guest_agent.p2p.clock import Clock
    from guest_agent.p2p.events import Recorder

DEFAULT_TIMEOUT_NS = 10_000_000_000


class Operation:
    """Something to be done once ``after`` have signalled; ``fence`` says when it is done."""

    def __init__(
        self,
        name: str,
        fence: Fence,
        begin: Callable[[], Fence | None],
        after: Iterable[Fence],
        needs: Iterable[Fence],
        cause: int,
        added_ns: int,
    ) -> None:
        self.name = name
        self.added_ns = added_ns
        self.cause = cause  # the event that queued it
        self.fence = fence
        self.begin = begin
        self.needs = {id(each) for each in needs}
        self.after = {id(each): each for each in (*after, *needs)}
        self.begun = False
        self.device: Fence | None = None  # what the device promised


class Graph:
    """The operations under way.

    :param timeout_ns: what each operation's fence is given, from the moment it is added.
    """

    def __init__(
        self, clock: Clock, events: Recorder, timeout_ns: int = DEFAULT_TIMEOUT_NS
    ) -> None:
        self._clock = clock
        self._events = events
        self._timeout_ns = timeout_ns
        self._context = FenceContext("operations")
        self._waiting: dict[int, Operation] = {}  # by the identity of their fence
        self._deferred: list[Callable[[], object]] = []

    def __len__(self) -> int:
        """How many are not done, deferred work included."""
        return len(self._waiting) + len(self._deferred)

    def defer(self, work: Callable[[], object]) -> None:
        """Do this at the next :meth:`pump`: what a fence's callback may not do itself, such as
        locking a reservation."""
        self._deferred.append(work)

    def add(
        self,
        name: str,
        begin: Callable[[], Fence | None],
        after: Iterable[Fence] = (),
        needs: Sequence[Fence] = (),
        context: FenceContext | None = None,
    ) -> Operation:
        """Add an operation; it begins at once if nothing is left to wait for.

        :param begin: starts it, and returns the device's fence or None if it is done.
        :param after: what must have ended, well or not.
        :param needs: what must have ended well.
        """
        now_ns = self._clock.now_ns()
        fence = Fence(context or self._context, name, now_ns + self._timeout_ns, self._ask)
        operation = Operation(name, fence, begin, after, needs, self._events.current, now_ns)
        self._waiting[id(fence)] = operation
        self._try(operation)
        return operation

    def wait_for(self, operation: Operation, fence: Fence) -> None:
        """Let an operation that has not begun wait for one more fence.

        :raises CycleError: that fence waits, directly or not, for the operation itself.
        :raises P2PError: the operation has begun.
        """
        if operation.begun:
            raise P2PError(f"{operation.name} has begun and can wait for nothing more")
        cycle = self._way(fence, operation)
        if cycle:
            raise CycleError([operation.name, *cycle])
        operation.after[id(fence)] = fence

    def _way(self, fence: Fence, target: Operation) -> list[str]:
        """The operations from ``fence`` back to ``target``, or [] if it does not depend on it."""
        seen: set[int] = set()
        stack = [(fence, [fence.what])]
        while stack:
            each, names = stack.pop()
            if each is target.fence:
                return names
            operation = self._waiting.get(id(each))
            if operation is not None and id(each) not in seen:
                seen.add(id(each))
                stack.extend((next_, [*names, next_.what]) for next_ in operation.after.values())
        return []

    def fail(self, fence: Fence, error: Exception) -> None:
        """End an operation whose owner is dead; does nothing for fences that are not of this graph
        or have signalled."""
        operation = self._waiting.get(id(fence))
        if operation is not None:
            self._finish(operation, error)

    def pump(self) -> None:
        """Begin all that has become possible, and see what devices have finished."""
        progress = True
        while progress:
            progress = False
            for operation in list(self._waiting.values()):
                if operation.device is not None:
                    progress |= operation.device.is_signalled()
                elif not operation.begun:
                    progress |= self._try(operation)
        deferred, self._deferred = self._deferred, []
        for work in deferred:
            work()

    def _ask(self) -> bool:
        """The poll of the operations' fences: whatever is due signals on its own."""
        self.pump()
        return False

    def _try(self, operation: Operation) -> bool:
        """Begin it if nothing is left to wait for; whether anything changed."""
        for fence in list(operation.after.values()):
            # Those of this graph signal when they leave it: asking them would go round in circles.
            if id(fence) in self._waiting or not fence.is_signalled():
                return False
            if fence.error is not None and id(fence) in operation.needs:
                failed = FenceFailedError(f"{operation.name} was not begun: {fence} failed")
                self._finish(operation, failed)
                return True
            del operation.after[id(fence)]
        operation.begun = True
        try:
            operation.device = operation.begin()
        except Exception as error:  # whatever it is, those who wait must know
            self._finish(operation, error)
        else:
            if operation.device is None:
                self._finish(operation, None)
            else:
                operation.device.when_signalled(lambda done: self._finish(operation, done.error))
        return True

    def _finish(self, operation: Operation, error: Exception | None) -> None:
        if self._waiting.pop(id(operation.fence), None) is None:
            return  # it was ended in between
        what, failed = str(operation.fence), str(error or "")
        took_ns = self._clock.now_ns() - operation.added_ns
        self._events.note("fence", what, operation.cause, failed=failed, took_ns=took_ns)
        operation.fence.signal(error)
