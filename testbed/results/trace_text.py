# SPDX-License-Identifier: Apache-2.0
"""A trace for people: each event in its place, when it was, how long it took, and what made it so.

::

    +0.000 s test of_several_ways_the_best_is_taken_every_time
    +0.001 s   attach nic0 on nic0 (1.8 ms): pcie gpu0 → pcie nic1 (device)                     #2
    +0.001 s     negotiate nic0 on nic0 (1.5 ms): best-quality: pcie gpu0 → pcie nic1 (device)  #3
                 lost: pcie gpu0 → pcie nic0: more ACS redirects on the way (1 against 0)
    +0.031 s   fence operations#1 (copy of b) (12.2 ms): signalled                 #9 because of #7
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from testbed.results.trace import Event, Room

_MS = 1_000_000
_UNITS = ((1_000_000_000, "s"), (_MS, "ms"), (1000, "us"), (1, "ns"))
_SAID_OTHERWISE = ("lost", "pairs", "policy", "chosen", "took_ns", "failed", "reasons")


def lines(rooms: Sequence[Room]) -> Iterator[str]:
    """The trace as text, a line an event and one for each of its reasons."""
    for room in rooms:
        start_ns = min(event.time_ns for event in room.events)
        yield f"{room.node}, {len(room.events)} events ({room.file})"
        for depth, event in room.tree():
            since = f"+{(event.time_ns - start_ns) / 1e9:.3f} s"
            yield f"{since:>12} {'  ' * depth}{_line(event)}"
            space = " " * 13 + "  " * (depth + 1)
            for name in ("lost", "reasons"):
                yield from (f"{space}{name}: {each}" for each in event.details.get(name, ()))
        yield ""


def _line(event: Event) -> str:
    took_ns = event.duration_ns or event.details.get("took_ns", 0)
    parts = [f"{event.kind} {event.subject.removeprefix(f'{event.kind} ')}"]
    if took_ns:
        parts.append(f" ({duration(took_ns)})")
    said = event.error or _said(event.kind, event.details)
    if said:
        parts.append(f": {said}")
    parts.append(f"  #{event.number}")
    if event.cause:
        parts.append(f" because of #{event.cause}")
    return "".join(parts)


def _said(kind: str, details: Mapping[str, Any]) -> str:
    if "policy" in details:
        return f"{details['policy']}: {details.get('chosen') or 'nothing was chosen'}"
    if kind == "fence":
        return str(details.get("failed") or "signalled")
    words = []
    for name, value in details.items():
        if name in _SAID_OTHERWISE or value is False:
            continue
        plain = name in ("path", "way", "why", "what", "action", "address")
        words.append(name if value is True else str(value) if plain else f"{name} {value}")
    return ", ".join(words)


def duration(time_ns: int) -> str:
    """``1.8 ms``."""
    for size_ns, unit in _UNITS:
        if time_ns >= size_ns:
            return f"{time_ns / size_ns:.1f} {unit}" if size_ns > 1 else f"{time_ns} {unit}"
    return "0 ns"
