# SPDX-License-Identifier: Apache-2.0
"""A trace in the Trace Event Format, for https://ui.perfetto.dev and chrome://tracing.

The JSON object form of the "Trace Event Format" document of Chromium's catapult: what takes time is
a complete event (``X``), what takes none an instant (``i``), names are metadata (``M``), and a flow
(``s`` to ``f``, bound to the slice around it) leads from a cause to what it caused. Times are
microseconds by the guest's clock.

A room of the core is a process. Its first thread is what the core did, whose slices nest as the
events do. Fences overlap as they like, so that they have lanes of their own: a slice from the time
when it was promised to its signal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from testbed.results.trace import Event, Room

CORE = 1  # the thread of what the core did; fences' lanes follow
_CHAPTER = "test"  # what has parts for as long as they last

Data = dict[str, Any]


def document(rooms: Sequence[Room], run: str) -> Data:
    """The whole file, for ``json.dump``."""
    events = [each for pid, room in enumerate(rooms, 1) for each in _room(pid, room)]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"format": "testbed.trace.perfetto/1", "run": run},
    }


def _room(pid: int, room: Room) -> Iterator[Data]:
    yield _named(pid, CORE, "process_name", f"{room.node} ({room.file})")
    yield {**_named(pid, CORE, "process_sort_index", ""), "args": {"sort_index": pid}}
    yield _named(pid, CORE, "thread_name", "protocol core")
    spans = _spans(room)
    lanes: list[int] = []  # the end of each lane's last slice
    slices: dict[int, tuple[int, int, int]] = {}  # by number: thread, start, end
    named = {number for event in room.events for number in (event.cause, event.parent)}
    for event in room.events:
        start_ns, end_ns = spans[event.number]
        tid = CORE
        if event.kind == "fence":
            lane = next((i for i, free_ns in enumerate(lanes) if free_ns <= start_ns), len(lanes))
            if lane == len(lanes):
                lanes.append(0)
                yield _named(pid, CORE + 1 + lane, "thread_name", f"fences {lane + 1}")
            lanes[lane] = end_ns
            tid = CORE + 1 + lane
        place = {"pid": pid, "tid": tid, "ts": _us(start_ns)}
        name = f"{event.kind} {event.subject.removeprefix(f'{event.kind} ')}"
        body = {"name": name, "cat": event.kind, "args": _args(event)}
        if event.duration_ns or event.kind in ("fence", _CHAPTER) or event.number in named:
            slices[event.number] = (tid, start_ns, end_ns)
            yield {"ph": "X", **place, "dur": _us(end_ns - start_ns), **body}
        else:
            yield {"ph": "i", **place, "s": "t", **body}
    for event in room.events:
        if event.cause in slices and event.number in slices:
            yield from _flow(pid, event.number, slices[event.cause], slices[event.number])


def _spans(room: Room) -> dict[int, tuple[int, int]]:
    """Start and end of each event; a chapter lasts as long as its parts do."""
    spans: dict[int, tuple[int, int]] = {}
    last: dict[int, int] = {}
    for event in reversed(room.events):
        start_ns, end_ns = event.time_ns, event.end_ns
        if event.kind == "fence":
            start_ns -= int(event.details.get("took_ns", 0))
        elif event.kind == _CHAPTER:
            end_ns = max(end_ns, last.get(event.number, 0))
        last[event.parent] = max(last.get(event.parent, 0), end_ns)
        spans[event.number] = (start_ns, end_ns)
    return spans


def _flow(
    pid: int, number: int, cause: tuple[int, int, int], effect: tuple[int, int, int]
) -> Iterator[Data]:
    """From within the cause's slice to the start of the effect's."""
    tid, start_ns, end_ns = cause
    leaves_ns = min(max(effect[1], start_ns), end_ns)
    common = {"name": "cause", "cat": "cause", "id": f"{pid}.{number}", "pid": pid}
    yield {"ph": "s", **common, "tid": tid, "ts": _us(leaves_ns)}
    yield {"ph": "f", "bp": "e", **common, "tid": effect[0], "ts": _us(effect[1])}


def _args(event: Event) -> Data:
    said = {"error": event.error} if event.error else {}
    return {
        "number": event.number,
        "cause": event.cause,
        "parent": event.parent,
        **said,
        **event.details,
    }


def _named(pid: int, tid: int, what: str, name: str) -> Data:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}


def _us(time_ns: int) -> float:
    return time_ns / 1000
