# SPDX-License-Identifier: Apache-2.0
"""One display for many runs: a bar and what runs on a terminal, a line for each end in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichBars

from testbed.results.table import STYLES
from testbed.results.verdicts import Verdict

_SHOWN = 60


class Display(Protocol):
    """Who is told; from any thread."""

    def say(self, text: str) -> None:
        """One line worth reading."""

    def started(self, name: str) -> None:
        """It runs."""

    def ended(self, name: str, verdict: Verdict, reason: str, duration_s: float) -> None:
        """It has ended."""


class PlainDisplay:
    """Lines on standard error."""

    def __init__(self, total: int, console: Console) -> None:
        self._total = total
        self._console = console
        self._ended = 0
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """One line."""
        with self._lock:
            self._console.print(f"testbed: {text}", markup=False, highlight=False, soft_wrap=True)

    def started(self, name: str) -> None:
        """Nothing; its end is told."""

    def ended(self, name: str, verdict: Verdict, reason: str, duration_s: float) -> None:
        """``[3/12] FAIL NAME (12.3 s): reason``."""
        with self._lock:
            self._ended += 1
            number = self._ended
        words = f": {reason}" if reason else ""
        self.say(f"[{number}/{self._total}] {verdict} {name} ({duration_s:.1f} s){words}")


class TerminalDisplay:
    """A bar for all, a line for each that runs; what was not a PASS is told above them."""

    def __init__(self, total: int, bars: RichBars) -> None:
        self._bars = bars
        self._lock = threading.Lock()
        self._all = bars.add_task("all", total=total)
        self._running: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._bars.console.print(f"testbed: {text}", markup=False, highlight=False)

    def started(self, name: str) -> None:
        """It joins those that are named beside the bar."""
        with self._lock:
            self._running[name] = time.monotonic()
            self._describe()

    def ended(self, name: str, verdict: Verdict, reason: str, duration_s: float) -> None:
        """It leaves them, and the bar grows."""
        with self._lock:
            self._running.pop(name, None)
            self._bars.advance(self._all)
            self._describe()
        style = STYLES[verdict]
        words = f": {escape(reason)}" if reason else ""
        line = f"[{style}]{verdict}[/] {escape(name)} ({duration_s:.1f} s){words}"
        self._bars.console.print(line, highlight=False, soft_wrap=True)

    def _describe(self) -> None:
        names = ", ".join(sorted(self._running, key=self._running.__getitem__))
        shown = names if len(names) <= _SHOWN else f"{names[:_SHOWN]}…"
        self._bars.update(self._all, description=escape(shown) or "waiting")


@contextmanager
def shown(total: int, done: int = 0) -> Iterator[Display]:
    """The kind that fits standard error, for ``total`` runs of which ``done`` have ended."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield PlainDisplay(total - done, console)
        return
    columns = (
        *(MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn()),
        TextColumn("{task.description}"),
    )
    with RichBars(*columns, console=console, transient=True) as bars:
        yield TerminalDisplay(total - done, bars)
