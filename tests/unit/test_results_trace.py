# SPDX-License-Identifier: Apache-2.0
"""Traces: read back, as text, and as a file that trace viewers open."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from guest_agent.p2p.odp import OnDemand
from testbed.errors import InputError
from testbed.results import trace as traces
from testbed.results import trace_perfetto, trace_text
from testbed.results.trace import FILE_NAME, Event, Room
from testbed.verbs.group import cli
from tests.unit.p2p.machines import SYSTEM, Machine, gpu_offers

# --- the Trace Event Format, as strictly as its document says it (JSON object form)

Us = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    pid: int
    tid: int
    name: str


class Complete(_Strict):
    ph: Literal["X"]
    ts: Us
    dur: Us
    cat: str
    args: dict[str, Any]


class Instant(_Strict):
    ph: Literal["i"]
    ts: Us
    s: Literal["g", "p", "t"]
    cat: str
    args: dict[str, Any]


class FlowStart(_Strict):
    ph: Literal["s"]
    ts: Us
    cat: str
    id: str


class FlowEnd(_Strict):
    ph: Literal["f"]
    ts: Us
    cat: str
    id: str
    bp: Literal["e"]


class Metadata(_Strict):
    ph: Literal["M"]
    name: Literal["process_name", "process_sort_index", "thread_name"]
    args: dict[str, str | int]


One = Annotated[
    Complete | Instant | FlowStart | FlowEnd | Metadata, Field(discriminator="ph")
]  # fmt: skip


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    traceEvents: list[One]  # noqa: N815  the format's word
    displayTimeUnit: Literal["ms", "ns"]  # noqa: N815
    otherData: dict[str, str]  # noqa: N815


def ns(time_us: float) -> int:
    return round(time_us * 1000)


def opened(rooms: list[Room]) -> list[Any]:
    """The file, parsed strictly; with what the viewers demand beyond its form."""
    text = json.dumps(trace_perfetto.document(rooms, "run"), allow_nan=False)
    events: list[Any] = TypeAdapter(Document).validate_json(text).traceEvents
    named = {(e.pid, e.tid) for e in events if e.ph == "M" and e.name == "thread_name"}
    slices: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in events:
        if event.ph != "M":
            assert (event.pid, event.tid) in named, "a thread without a name"
        if event.ph == "X":
            start = ns(event.ts)
            slices.setdefault((event.pid, event.tid), []).append((start, start + ns(event.dur)))
    for found in slices.values():  # slices of a thread nest
        stack: list[int] = []
        for start, end in sorted(found, key=lambda each: (each[0], -each[1])):
            while stack and stack[-1] <= start:
                stack.pop()
            assert not stack or end <= stack[-1], "slices overlap"
            stack.append(end)
    flows = {kind: {e.id: e for e in events if e.ph == kind} for kind in "sf"}
    assert flows["s"].keys() == flows["f"].keys()
    for flow in (*flows["s"].values(), *flows["f"].values()):
        there = slices[flow.pid, flow.tid]
        assert any(start <= ns(flow.ts) <= end for start, end in there), "binds to none"
    return events


def story() -> list[dict[str, Any]]:
    """A test's events from the core itself: attach, move with a copy, a fault, a keep-alive."""
    machine = Machine()
    machine.clock.run(10**9)
    recorder = machine.core.events
    for title in ("first", "second"):
        recorder.chapter("test", title)
        buffer = machine.export(title)
        machine.map(machine.attach(buffer, "gpu1"))
        importer = OnDemand(buffer, "nic0.0", gpu_offers("nic0.0"), keep_alive_ns=10_000)
        importer.fault()
        machine.move(buffer, SYSTEM)
        importer.read(0, 8192)
        machine.settle()
    return [{"node": "one", **event.as_json()} for event in recorder.events()]


def write(folder: Path, lines: list[Any]) -> Path:
    file = folder / "rack" / FILE_NAME
    file.parent.mkdir(exist_ok=True, parents=True)
    with file.open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    return file


def test_a_story_is_a_tree_with_causes(tmp_path: Path) -> None:
    write(tmp_path, story())
    (room,) = traces.read(tmp_path)
    by_number = {event.number: event for event in room.events}
    depths = {event.number: depth for depth, event in room.tree()}
    assert len(depths) == len(room.events)
    chapters = [event for event in room.events if event.kind == "test"]
    assert [event.subject for event in chapters] == ["first", "second"]
    assert all(depths[event.number] == 0 for event in chapters)
    assert all(depth > 0 for number, depth in depths.items() if by_number[number].kind != "test")
    move = next(event for event in room.events if event.kind == "move")
    copy = next(event for event in room.events if event.cause == move.number)
    assert copy.kind == "fence"
    assert "copy of first" in copy.subject
    assert by_number[move.cause].kind == "prepare"
    parts = [event for event in room.events if event.parent == move.cause]
    assert parts
    assert {event.kind for event in parts} == {"negotiate"}
    kept = [event for event in room.events if "transfer after a fault" in event.subject]
    assert {by_number[event.cause].kind for event in kept} == {"fault"}


def test_the_text_has_every_event_with_its_time_and_cause(tmp_path: Path) -> None:
    write(tmp_path, story())
    rooms = traces.read(tmp_path)
    text = "\n".join(trace_text.lines(rooms))
    for event in rooms[0].events:
        assert f"  #{event.number}" in text
    assert "test first" in text
    assert "negotiate gpu1 on first" in text
    assert "lost: " in text
    assert "because of #" in text
    assert "fence fence" not in text


def test_the_perfetto_file_is_what_its_format_says(tmp_path: Path) -> None:
    lines = story()
    write(tmp_path, lines)
    rooms = list(traces.read(tmp_path))
    events = opened(rooms)
    kinds = Counter(event.ph for event in events)
    assert kinds["X"] + kinds["i"] == len(lines)
    assert kinds["s"] >= 4  # a move's fence and what prepared it, in each chapter
    tests = [e for e in events if e.ph == "X" and e.cat == "test"]
    for one, next_ in pairwise(tests):
        assert 0 < one.dur <= next_.ts - one.ts


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 50), st.booleans(), st.integers(0, 9)),
        min_size=1,
        max_size=25,
    )
)
def test_whatever_nests_and_whatever_overlaps_the_file_is_right(
    wishes: list[tuple[int, int, bool, int]],
) -> None:
    """Spans opened and closed in any way, fences of any length, causes of any event before."""
    now = 1_000_000
    done: list[Event] = []
    stack: list[tuple[int, int]] = []
    for number, (closes, took, is_fence, cause) in enumerate(wishes, 1):
        for _ in range(min(closes, len(stack))):
            began, start = stack.pop()
            now += 1
            parent = stack[-1][0] if stack else 0
            done.append(Event("n", began, start, now - start, "attach", "a", 0, parent))
        now += took
        parent = stack[-1][0] if stack else 0
        if is_fence:
            details = {"took_ns": took * cause, "failed": ""}
            done.append(
                Event(
                    "n", number, now, 0, "fence", "f", min(cause, number - 1), parent, "", details
                )
            )
        else:
            stack.append((number, now))
    while stack:
        began, start = stack.pop()
        now += 1
        done.append(
            Event("n", began, start, now - start, "attach", "a", 0, stack[-1][0] if stack else 0)
        )
    opened([Room("n", FILE_NAME, tuple(sorted(done, key=lambda event: event.number)))])


def test_rooms_are_told_apart_by_node_and_by_their_numbers(tmp_path: Path) -> None:
    lines = story()
    write(tmp_path, lines)
    write(tmp_path, [{**line, "node": "two"} for line in lines])
    write(tmp_path, lines)
    rooms = traces.read(tmp_path)
    assert Counter(room.node for room in rooms) == {"one": 2, "two": 1}
    assert all(len(room.events) == len(lines) for room in rooms)
    assert {event.pid for event in opened(list(rooms))} == {1, 2, 3}


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    lines = story()
    file = write(tmp_path, lines)
    file.write_text(file.read_text()[:-10])
    assert len(traces.read(tmp_path)[0].events) == len(lines) - 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2:\d+: is no JSON"),
        ("[]", ":2:1: Input should be an object"),
        ('{"node": "n"}', ":2:1: number: Field required"),
        ('{"number": "seven"}', ":2:1: number: Input should be a valid integer"),
        ('{"colour": 1}', ":2:1: colour: Unexpected keyword argument"),
        ("[" * 100_000, ":2:"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path, story()[:1])
    file.write_text(f"{file.read_text()}{line}\n{file.read_text()}")
    with pytest.raises(InputError, match=FILE_NAME + message):
        traces.read(tmp_path)


@given(st.binary(max_size=200))
def test_no_file_makes_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / FILE_NAME).write_bytes(data)
    try:
        rooms = traces.read(folder)
    except InputError:
        return
    assert all(room.events for room in rooms)


# --- the verb


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESTBED_STATE_DIR", str(tmp_path))
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def call(*words: str) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(cli, ["trace", *words])
    return result.stdout, result.exception


def test_the_newest_run_with_events_is_shown(runs: Path) -> None:
    write(runs / "20260101-000000-a-1111", story())
    (runs / "20260102-000000-b-2222").mkdir()
    out, error = call()
    assert error is None
    assert "test second" in out
    assert call("20260101-000000-a-1111")[0] == out
    assert call(str(runs / "20260101-000000-a-1111"))[0] == out


def test_json_is_versioned_and_whole(runs: Path) -> None:
    lines = story()
    write(runs / "a", lines)
    data = json.loads(call("a", "--format", "json")[0])
    assert data["format"] == "testbed.trace/1"
    assert [asdict(e) for e in traces.read(runs / "a")[0].events] == data["rooms"][0]["events"]
    assert len(lines) == len(data["rooms"][0]["events"])


def test_perfetto_goes_to_a_file(runs: Path, tmp_path: Path) -> None:
    write(runs / "a", story())
    target = tmp_path / "trace.json"
    out, error = call("a", "--format", "perfetto", "-o", str(target))
    assert (out, error) == ("", None)
    TypeAdapter(Document).validate_json(target.read_text())


def test_bad_words_are_said_in_one_message(runs: Path, tmp_path: Path) -> None:
    assert "no run in" in str(call()[1])
    write(runs / "run-1", story())
    assert "did you mean 'run-1'?" in str(call("run-2")[1])
    (tmp_path / "file").write_text("")
    assert "is no folder" in str(call(str(tmp_path / "file"))[1])
    (tmp_path / "empty").mkdir()
    assert f"has no {FILE_NAME}" in str(call(str(tmp_path / "empty"))[1])
    unwritable = str(tmp_path / "none" / "x")
    assert "cannot write" in str(call("run-1", "-o", unwritable)[1])
