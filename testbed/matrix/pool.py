# SPDX-License-Identifier: Apache-2.0
"""Work of this machine, several at once: admitted in order, as memory and processors allow.

Each piece of work has a thread, which waits for a process of its own (:mod:`testbed.matrix.child`).
Ctrl-C sets the pool's flag; every thread sees it, ends its process, and the pool waits for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from testbed.matrix.needs import Need, Room, sum_of

T = TypeVar("T")
R = TypeVar("R")
_TICK_S = 0.5  # so often the main thread can be interrupted


class Pool(Generic[T, R]):
    """Does ``work`` on items.

    :param need_of: what one item takes of ``room``.
    :param work: is called in a thread, with a function that says whether to give up.
    """

    def __init__(
        self,
        room: Room,
        need_of: Callable[[T], Need],
        work: Callable[[T, Callable[[], bool]], R],
        *,
        on_start: Callable[[T], None] = lambda _: None,
    ) -> None:
        self._room = room
        self._need_of = need_of
        self._work = work
        self._on_start = on_start
        self._stopped = threading.Event()

    def results(self, items: Sequence[T]) -> Iterator[tuple[T, R]]:
        """Each item with its result, as they end.

        If the caller is interrupted or stops early, everything running is ended first. What
        ``work`` raises is raised here, and ends the others too.
        """
        waiting = list(reversed(items))
        running: dict[Future[R], T] = {}
        with ThreadPoolExecutor(self._room.slots, thread_name_prefix="cell") as threads:
            try:
                while waiting or running:
                    self._admit(waiting, running, threads)
                    done, _ = wait(running, timeout=_TICK_S, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield running.pop(future), future.result()
            finally:
                self._stopped.set()

    def _admit(
        self, waiting: list[T], running: dict[Future[R], T], threads: ThreadPoolExecutor
    ) -> None:
        """Start what there is room for. In order: what is large shall not wait for ever."""
        while waiting:
            used = sum_of([self._need_of(item) for item in running.values()])
            if not self._room.holds(self._need_of(waiting[-1]), used, len(running)):
                return
            item = waiting.pop()
            self._on_start(item)
            running[threads.submit(self._work, item, self._stopped.is_set)] = item
