# SPDX-License-Identifier: Apache-2.0
"""Reservations, fences and the graph of operations: order, locking rules, deadlines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent.p2p import rules
from guest_agent.p2p.clock import ManualClock
from guest_agent.p2p.errors import (
    CycleError,
    FenceFailedError,
    FenceTimeoutError,
    LockBusyError,
    P2PError,
    RuleError,
)
from guest_agent.p2p.events import Recorder
from guest_agent.p2p.fence import Fence, FenceContext, KeepAlive
from guest_agent.p2p.graph import Graph, Operation
from guest_agent.p2p.resv import Acquire, Reservation, Usage, locked
from guest_agent.p2p.rules import Task


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def fence(line: FenceContext | None = None, what: str = "work", due: int = 10**9) -> Fence:
    return Fence(line or FenceContext("engine"), what, due)


# --- usages


def test_asking_for_a_usage_gives_the_lower_ones_too() -> None:
    resv, task = Reservation("r"), Task("t")
    fences = {usage: fence() for usage in Usage}
    with locked(task, resv):
        for usage, each in fences.items():
            resv.reserve(task)
            resv.add(task, each, usage)
    for usage in Usage:
        assert set(resv.fences(usage)) == {f for its, f in fences.items() if its <= usage}
    assert Usage.to_wait_for(write=True) is Usage.READ
    assert Usage.to_wait_for(write=False) is Usage.WRITE
    fences[Usage.KERNEL].signal()
    assert resv.is_idle(Usage.KERNEL)
    assert not resv.is_idle(Usage.WRITE)


def test_a_later_fence_of_a_context_replaces_the_earlier_and_promotion_is_for_good() -> None:
    resv, task, line = Reservation("r"), Task("t"), FenceContext("e")
    first, second = fence(line), fence(line)
    with locked(task, resv):
        for _ in range(3):
            for each in (first, second):
                resv.reserve(task)
                resv.add(task, each, Usage.READ)
        assert second in resv.fences(Usage.READ)
        resv.reserve(task)
        resv.add(task, second, Usage.WRITE)
        assert resv.fences(Usage.WRITE) == [second]
        resv.reserve(task)
        resv.add(task, second, Usage.BOOKKEEP)
        assert resv.fences(Usage.WRITE) == [second]
        # a stronger one is not dropped for a later weaker one
        third = fence(line)
        resv.reserve(task)
        resv.add(task, third, Usage.BOOKKEEP)
        assert resv.fences(Usage.WRITE) == [second]


def test_reservations_do_not_grow_with_what_is_done() -> None:
    resv, task = Reservation("r"), Task("t")
    for _ in range(1000):
        each = fence()
        with locked(task, resv):
            resv.reserve(task)
            resv.add(task, each, Usage.READ)
        each.signal()
    assert len(resv) <= 2


# --- rules


def test_wrong_context_is_an_error_that_names_the_rule_and_its_source() -> None:
    resv, task = Reservation("buf0"), Task("nic0")
    with pytest.raises(RuleError, match=r"buf0.*dma-resv\.c") as error:
        resv.add(task, fence(), Usage.READ)
    assert error.value.rule is rules.FENCE_LOCKED
    with locked(task, resv), pytest.raises(RuleError) as error:
        resv.add(task, fence(), Usage.READ)
    assert error.value.rule is rules.RESERVED_FIRST
    with task.signalling(), pytest.raises(RuleError) as error, locked(task, resv):
        pass
    assert error.value.rule is rules.SIGNALLING
    with locked(task, resv), pytest.raises(RuleError) as error, locked(task, Reservation("b")):
        pass
    assert error.value.rule is rules.ONE_CONTEXT
    assert not task.held
    assert resv.holder is None


def test_every_rule_says_where_it_is_written() -> None:
    assert len(rules.RULES) > 15
    for rule in rules.RULES.values():
        assert rule.text
        assert "/" in rule.source or "RFC" in rule.source


def test_a_lock_that_another_task_holds_is_named_with_its_owner() -> None:
    resv = Reservation("buf0")
    with (
        locked(Task("mover"), resv),
        pytest.raises(LockBusyError, match="nic0 wants buf0, which mover"),
        locked(Task("nic0"), resv),
    ):
        pass
    assert resv.holder is None


# --- several locks at once


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=2, max_size=6),
    st.randoms(use_true_random=False),
)
def test_tasks_that_lock_in_any_order_all_get_through(
    orders: list[list[int]], random: object
) -> None:
    resvs = [Reservation(f"r{n}") for n in range(5)]

    def work(task: Task, order: list[int]) -> Iterator[None]:
        context = Acquire(task)
        for _ in context.steps([resvs[n] for n in order]):
            yield
        for n in order:
            assert resvs[n].holder is context
        yield
        context.release()

    running = [work(Task(f"t{n}"), order) for n, order in enumerate(orders)]
    for _ in range(10_000):
        if not running:
            break
        each = random.choice(running)  # type: ignore[attr-defined]
        try:
            next(each)
        except StopIteration:
            running.remove(each)
    assert not running, "deadlock"
    assert all(resv.holder is None for resv in resvs)


def test_the_younger_gives_way_where_two_would_wait_for_each_other() -> None:
    a, b, gate = (Reservation(name) for name in ("a", "b", "gate"))
    older, holder, younger = (Acquire(Task(name)) for name in ("older", "holder", "younger"))
    list(holder.steps([gate]))
    olders, youngers = older.steps([a, gate, b]), younger.steps([b, a])
    assert next(olders) is gate  # holding a
    assert next(youngers) is a  # holding nothing: b was given back
    assert b.holder is None
    holder.release()
    assert list(olders) == []
    assert older.held == [a, gate, b]
    assert next(youngers) is a
    older.release()
    assert list(youngers) == []
    assert {each.name for each in younger.held} == {"a", "b"}


def test_a_context_locks_all_at_once() -> None:
    a, b, task = Reservation("a"), Reservation("b"), Task("t")
    with locked(task, a) as context, pytest.raises(P2PError, match="all of its reservations"):
        list(context.steps([b]))


# --- fences


def test_a_fence_that_is_not_kept_is_named(clock: ManualClock) -> None:
    owed = fence(FenceContext("nic0 queue"), "send 7", due=500)
    with pytest.raises(FenceTimeoutError, match=r"nic0 queue#1 \(send 7\)"):
        owed.wait(clock)
    assert clock.now_ns() == 500
    with pytest.raises(FenceTimeoutError):
        fence(due=10**9).wait(clock, until_ns=600)
    assert clock.now_ns() == 600


def test_a_fence_signals_once_and_tells_its_error(clock: ManualClock) -> None:
    each = fence()
    seen: list[Fence] = []
    each.when_signalled(seen.append)
    clock.after(30, lambda: each.signal(OSError("link down")))
    with pytest.raises(FenceFailedError, match="link down"):
        each.wait(clock)
    assert clock.now_ns() == 30
    each.wait_end(clock)
    assert seen == [each]
    with pytest.raises(P2PError, match="twice"):
        each.signal()


def test_a_device_is_asked_and_its_failure_reaches_those_who_wait(clock: ManualClock) -> None:
    answers = iter([False, True])
    Fence(FenceContext("e"), "x", 10**9, lambda: next(answers)).wait(clock)

    def gone() -> bool:
        raise OSError("device is gone")

    with pytest.raises(FenceFailedError, match="device is gone"):
        Fence(FenceContext("e"), "x", 10**9, gone).wait(clock)


def test_a_keep_alive_blocks_a_move_but_no_access_and_ends_by_itself(clock: ManualClock) -> None:
    resv, task = Reservation("r"), Task("t")
    alive = KeepAlive(FenceContext("odp"), "page fault", clock, 100)
    with locked(task, resv):
        resv.reserve(task)
        resv.add(task, alive, Usage.BOOKKEEP)
        assert resv.is_idle(Usage.to_wait_for(write=True))
        assert not resv.is_idle(Usage.BOOKKEEP)
        resv.wait(clock, Usage.BOOKKEEP)
    assert clock.now_ns() == 100
    early = KeepAlive(FenceContext("odp"), "page fault", clock, 10**9)
    early.release()
    early.release()
    early.wait(clock)
    assert clock.now_ns() == 100


# --- the graph


def graph(clock: ManualClock) -> Graph:
    return Graph(clock, Recorder(clock))


def test_operations_begin_after_what_they_wait_for(clock: ManualClock) -> None:
    ops, done = graph(clock), list[str]()
    gate = fence()
    a = ops.add("a", lambda: done.append("a"), [gate])
    b = ops.add("b", lambda: done.append("b"), [a.fence])
    ops.add("c", lambda: done.append("c"))
    assert done == ["c"]
    gate.signal()
    b.fence.wait(clock)
    assert done == ["c", "a", "b"]
    assert len(ops) == 0


def test_a_chain_of_a_thousand_operations_needs_no_deep_stack(clock: ManualClock) -> None:
    ops, done = graph(clock), list[int]()
    last = gate = fence()
    for n in range(1000):
        last = ops.add(f"op{n}", lambda n=n: done.append(n), [last]).fence  # type: ignore[misc]
    gate.signal()
    last.wait(clock)
    assert done == list(range(1000))


def test_a_cycle_is_refused_and_named(clock: ManualClock) -> None:
    ops, gate = graph(clock), fence()
    a = ops.add("a", lambda: None, [gate])
    b = ops.add("b", lambda: None, [a.fence])
    c = ops.add("c", lambda: None, [b.fence])
    with pytest.raises(CycleError, match="a → c → b → a"):
        ops.wait_for(a, c.fence)
    with pytest.raises(CycleError):
        ops.wait_for(a, a.fence)
    gate.signal()
    c.fence.wait(clock)
    with pytest.raises(P2PError, match="has begun"):
        ops.wait_for(a, fence())


def test_what_needs_a_failure_fails_and_what_only_follows_it_goes_on(clock: ManualClock) -> None:
    ops, done = graph(clock), list[str]()

    def fail() -> None:
        raise OSError("no power")

    gate = fence()
    bad = ops.add("bad", fail, [gate])
    needs = ops.add("needs", lambda: done.append("needs"), needs=[bad.fence])
    follows = ops.add("follows", lambda: done.append("follows"), [bad.fence])
    gate.signal()
    follows.fence.wait(clock)
    with pytest.raises(FenceFailedError, match="not begun"):
        needs.fence.wait(clock)
    assert done == ["follows"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12),
)
def test_whatever_is_accepted_has_no_cycle_and_runs_in_order(
    plan: list[list[int]], extra: list[tuple[int, int]]
) -> None:
    clock = ManualClock()
    ops, gate, done = graph(clock), fence(), list[int]()
    nodes: list[Operation] = []
    waits: dict[int, set[int]] = {}
    for n, before in enumerate(plan):
        waits[n] = {b for b in before if b < n}
        after = [nodes[b].fence for b in waits[n]]
        nodes.append(ops.add(str(n), lambda n=n: done.append(n), [gate, *after]))  # type: ignore[misc]

    def reaches(start: int, end: int) -> bool:
        return start == end or any(reaches(b, end) for b in waits[start])

    for a, b in extra:
        if a >= len(nodes) or b >= len(nodes):
            continue
        if reaches(b, a):
            with pytest.raises(CycleError):
                ops.wait_for(nodes[a], nodes[b].fence)
        else:
            ops.wait_for(nodes[a], nodes[b].fence)
            waits[a].add(b)
    gate.signal()
    ops.pump()
    assert sorted(done) == list(range(len(nodes)))
    for n, first in waits.items():
        assert all(done.index(b) < done.index(n) for b in first)


# --- events


def test_events_have_time_cause_and_parent(clock: ManualClock) -> None:
    record = Recorder(clock)
    fault = record.note("fault", "nic0")
    with record.span("move", "buf0", fault, way="out") as span:
        clock.run(70)
        record.note("fence", "copy")
        span.details["moved"] = 4096
    with pytest.raises(ValueError, match="bad"), record.span("negotiate", "x"):
        raise ValueError("bad")
    events = record.as_json()["events"]
    assert [(e["number"], e["kind"], e["cause"], e["parent"]) for e in events] == [
        (1, "fault", 0, 0),
        (2, "move", 1, 0),
        (3, "fence", 0, 2),
        (4, "negotiate", 0, 0),
    ]
    assert events[1]["duration_ns"] == 70
    assert events[1]["details"] == {"way": "out", "moved": 4096}
    assert events[3]["error"] == "ValueError: bad"


def test_a_recorder_keeps_the_latest_and_counts_what_it_dropped(clock: ManualClock) -> None:
    seen: list[int] = []
    record = Recorder(clock, keep=10, sink=lambda event: seen.append(event.number))
    for n in range(25):
        record.note("map", str(n))
    assert [event.number for event in record.events()] == list(range(16, 26))
    assert record.dropped == 15
    assert seen == list(range(1, 26))
