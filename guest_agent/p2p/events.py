# SPDX-License-Identifier: Apache-2.0
"""What happened, when, because of what: one event for each negotiation, move, fence and fault.

An event says its time (of the clock handed in), its cause (the number of the event that made it
happen) and its parent (the event that it is a part of). Events are values that ``json`` can write;
rendering them, as text or as a trace file, is the host's work.
"""

from __future__ import annotations

import collections
import contextlib
from dataclasses import asdict, dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from guest_agent.p2p.clock import Clock

KEPT_EVENTS = 65536
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Event:
    """One event.

    ``number``       from 1, in the order of the starts.
    ``time_ns``      its start; ``duration_ns`` is 0 for what has none.
    ``kind``         ``negotiate``, ``attach``, ``map``, ``move``, ``fence``, ``fault`` …
    ``subject``      what it happened to: a buffer, an attachment, a fence.
    ``cause``        number of the event that made it happen, 0 if none is known.
    ``parent``       number of the event that it is a part of, or 0.
    ``error``        the error that ended it, or "".
    """

    number: int
    time_ns: int
    duration_ns: int
    kind: str
    subject: str
    cause: int
    parent: int
    error: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The event as an object that ``json.dumps`` takes."""
        return asdict(self)


class Span:
    """An event that is still under way; ``details`` may grow until it ends."""

    def __init__(self, number: int, details: dict[str, Any]) -> None:
        self.number = number
        self.details = details


class Recorder:
    """Takes events; keeps the latest, and counts those that it had to drop.

    :param clock: where the times come from.
    :param keep: how many events are kept.
    :param sink: called with each event as it ends, for whoever streams them.
    """

    def __init__(
        self,
        clock: Clock,
        keep: int = KEPT_EVENTS,
        sink: Callable[[Event], object] | None = None,
    ) -> None:
        self._clock = clock
        self._kept: collections.deque[Event] = collections.deque(maxlen=keep)
        self._sink = sink
        self._number = 0
        self._open: list[int] = []
        self._chapter = 0
        self.dropped = 0

    @property
    def current(self) -> int:
        """The number of the event that is under way, 0 if none is: the cause of what it queues."""
        return self._open[-1] if self._open else 0

    def chapter(self, kind: str, subject: str) -> int:
        """A part of the story begins: it is the parent of all that has no other from now on."""
        self._chapter = 0
        self._chapter = self.note(kind, subject)
        return self._chapter

    def note(self, kind: str, subject: str, cause: int = 0, **details: Any) -> int:
        """Something that takes no time; returns its number, for what it causes."""
        self._number += 1
        now_ns = self._clock.now_ns()
        parent = self.current or self._chapter
        self._put(Event(self._number, now_ns, 0, kind, subject, cause, parent, "", details))
        return self._number

    @contextlib.contextmanager
    def span(self, kind: str, subject: str, cause: int = 0, **details: Any) -> Iterator[Span]:
        """Something with parts: what is noted inside has it as its parent.

        An exception that leaves the block ends the event with that error, and goes on.
        """
        self._number += 1
        span = Span(self._number, details)
        start_ns = self._clock.now_ns()
        parent = self.current or self._chapter
        self._open.append(span.number)
        error = ""
        try:
            yield span
        except BaseException as caught:
            error = f"{type(caught).__name__}: {caught}"
            raise
        finally:
            self._open.remove(span.number)
            took_ns = self._clock.now_ns() - start_ns
            self._put(
                Event(span.number, start_ns, took_ns, kind, subject, cause, parent, error, details)
            )

    def _put(self, event: Event) -> None:
        if len(self._kept) == self._kept.maxlen:
            self.dropped += 1
        self._kept.append(event)
        if self._sink is not None:
            self._sink(event)

    def forget(self, number: int) -> None:
        """Let go of the events up to that number, which someone else has."""
        kept = [event for event in self._kept if event.number > number]
        if len(kept) < len(self._kept):
            self._kept = collections.deque(kept, self._kept.maxlen)

    def events(self) -> list[Event]:
        """What was kept, by number."""
        return sorted(self._kept, key=lambda event: event.number)

    def as_json(self) -> dict[str, Any]:
        """``{version, dropped, events}``."""
        return {
            "version": SCHEMA_VERSION,
            "dropped": self.dropped,
            "events": [event.as_json() for event in self.events()],
        }
