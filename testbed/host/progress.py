# SPDX-License-Identifier: Apache-2.0
"""What a person sees while something long happens: bars on a terminal, plain lines elsewhere.

Everything goes to standard error; standard output is for results.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

_PLAIN_PERIOD_S = 2.0


class Progress(Protocol):
    """How the stages of a set-up report; the methods may be called from several threads."""

    def say(self, text: str) -> None:
        """One line worth reading."""

    def update(self, task: str, done_bytes: int, total_bytes: int) -> None:
        """``task`` is that far; it ends when ``done_bytes`` reaches ``total_bytes``."""


class Silent:
    """Says nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def update(self, task: str, done_bytes: int, total_bytes: int) -> None:
        """Nothing."""


class PlainProgress:
    """Lines on standard error: each message, and each task's figures every few seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line."""
        with self._lock:
            print(text, file=sys.stderr, flush=True)  # noqa: T201 (this is the one who prints)

    def update(self, task: str, done_bytes: int, total_bytes: int) -> None:
        """A line, but not more often than every two seconds."""
        now = time.monotonic()
        with self._lock:
            first = self._last.setdefault(task, now)
            if now - first < _PLAIN_PERIOD_S or done_bytes >= total_bytes:
                return
            self._last[task] = now
        self.say(f"{task}: {megabytes(done_bytes)} of {megabytes(total_bytes)}")


class TerminalProgress:
    """Bars on a terminal, messages above them."""

    def __init__(self, bars: RichBars) -> None:
        self._bars = bars
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)

    def update(self, task: str, done_bytes: int, total_bytes: int) -> None:
        """Moves the task's bar, or makes or removes it."""
        with self._lock:
            if done_bytes >= total_bytes:
                if (ended := self._tasks.pop(task, None)) is not None:
                    self._bars.remove_task(ended)
                return
            if task not in self._tasks:
                self._tasks[task] = self._bars.add_task(task, total=total_bytes)
            self._bars.update(self._tasks[task], completed=done_bytes, total=total_bytes)


@contextmanager
def shown() -> Iterator[Progress]:
    """The kind that fits standard error."""
    if not sys.stderr.isatty():
        yield PlainProgress()
        return
    # Slow to import, and every start of a rack may have something to show.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, DownloadColumn, TextColumn  # noqa: PLC0415
    from rich.progress import Progress as RichBars  # noqa: PLC0415

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with RichBars(*columns, console=console, transient=True) as bars:
        yield TerminalProgress(bars)


def megabytes(size_bytes: int) -> str:
    """``12345678`` → ``12.3 MB``."""
    return f"{size_bytes / 1e6:.1f} MB"
