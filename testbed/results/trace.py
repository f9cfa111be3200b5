# SPDX-License-Identifier: Apache-2.0
"""What the protocol core did in a run, read back from the files that the run left.

A line of ``protocol-events.jsonl`` is one event of one node (:mod:`guest_agent.p2p.events`): its
time by the guest's clock, its cause (which event made it happen) and its parent (which event it is
a part of). Numbers begin at 1 in each *room*, so that a file has one for each time that the core
was opened on a node.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from testbed.errors import Diagnostic, InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FILE_NAME = "protocol-events.jsonl"
_MAX_WRONG = 20


@dataclass(frozen=True)
class Event:
    """One event. ``time_ns`` is its start; ``cause`` and ``parent`` are numbers, 0 for none."""

    node: str
    number: int
    time_ns: int
    duration_ns: int
    kind: str
    subject: str
    cause: int = 0
    parent: int = 0
    error: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    @property
    def end_ns(self) -> int:
        """When it ended."""
        return self.time_ns + self.duration_ns


@dataclass(frozen=True)
class Room:
    """What happened in one room of the core: events of one node, by number."""

    node: str
    file: str  # relative to the run folder
    events: tuple[Event, ...]

    def tree(self) -> Iterator[tuple[int, Event]]:
        """Each event with its depth, parents before their parts, in the order of their starts."""
        parts: dict[int, list[Event]] = {}
        known = {event.number for event in self.events}
        for event in self.events:
            parts.setdefault(event.parent if event.parent in known else 0, []).append(event)
        stack = [(0, event) for event in reversed(parts.get(0, []))]
        while stack:
            depth, event = stack.pop()
            yield depth, event
            stack += [(depth + 1, part) for part in reversed(parts.get(event.number, []))]


def newest(runs: Path) -> Path:
    """The newest run folder below ``runs`` that has events. :raises InputError: there is none."""
    try:
        folders = sorted(
            (each for each in runs.iterdir() if each.is_dir()),
            key=lambda each: each.stat().st_mtime_ns,
            reverse=True,
        )
    except OSError:
        folders = []
    for folder in folders:
        if files_of(folder):
            return folder
    raise InputError(
        f"no run in {runs} has protocol events", hint="testbed run p2p-negotiation makes some"
    )


def files_of(folder: Path) -> list[Path]:
    """The files with events in a run folder, one for each rack that ran in it."""
    return sorted(each for each in folder.rglob(FILE_NAME) if each.is_file())


def read(folder: Path) -> tuple[Room, ...]:
    """Everything that a run folder has.

    A last line that was cut off, because the run was killed while it was written, is left out.

    :raises InputError: there is nothing; or all that is wrong, by file, line and column.
    """
    files = files_of(folder)
    if not files:
        raise InputError(
            f"{folder} has no {FILE_NAME}", hint="testbed run p2p-negotiation makes one"
        )
    wrong: list[Diagnostic] = []
    rooms: list[Room] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            wrong.append(Diagnostic(str(file), 0, 0, f"cannot be read: {error}"))
            continue
        events = list(_events(str(file), text, wrong))
        rooms += _rooms(str(file.relative_to(folder)), events)
    if wrong:
        more = len(wrong) - _MAX_WRONG
        hint = f"and {more} more" if more > 0 else ""
        raise InputError(diagnostics=wrong[:_MAX_WRONG], hint=hint)
    return tuple(rooms)


def _events(name: str, text: str, wrong: list[Diagnostic]) -> Iterator[Event]:
    from pydantic import ValidationError  # noqa: PLC0415  slow

    lines = text.split("\n")
    last = len(lines)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            json.loads(line)  # says in which column
            yield _adapter().validate_json(line)
        except json.JSONDecodeError as error:
            if number < last:
                text = f"is no JSON: {error.msg}"
                wrong.append(Diagnostic(name, number, error.colno, text, "an event"))
        except RecursionError:
            wrong.append(Diagnostic(name, number, 1, "is nested too deeply", "an event"))
        except ValidationError as error:
            for each in error.errors(include_url=False):
                where = ".".join(map(str, each["loc"]))
                text = f"{where}: {each['msg']}" if where else each["msg"]
                wrong.append(Diagnostic(name, number, 1, text))


def _rooms(file: str, events: Sequence[Event]) -> Iterator[Room]:
    """Split a file's events by node, and where the numbers begin anew."""
    by_node: dict[str, list[list[Event]]] = {}
    for event in events:
        rooms = by_node.setdefault(event.node, [[]])
        if rooms[-1] and event.number <= rooms[-1][-1].number:
            rooms.append([])
        rooms[-1].append(event)
    for node, rooms in by_node.items():
        for room in rooms:
            yield Room(node, file, tuple(room))


@cache
def _adapter() -> TypeAdapter[Event]:
    from pydantic import TypeAdapter  # noqa: PLC0415  slow

    return TypeAdapter(Event)
