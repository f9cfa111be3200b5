# SPDX-License-Identifier: Apache-2.0
"""Conditions: what holds, what does not, and that neither is taken for the other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from guest_agent.pattern import pattern
from testbed.instruments.memory import sha256
from testbed.reports.conditions import AnyCondition
from testbed.reports.judge import Scene, judge_condition
from testbed.reports.references import Reference, ReferenceFault, references, resolve
from testbed.reports.seen import Seen
from testbed.results.evidence import Access, FaultSeen, Witness
from testbed.results.judging import FaultWindow
from tests.unit.reports.report_text import case_of

PLAN = case_of().plan
BDF = next(f.bdf for f in PLAN.nodes["host0"].functions if f.name == "gpu0.engine")
FAULT = FaultSeen(BDF, 0x1000, Access.WRITE, 5, Witness.MACHINE)


def digest(seed: int) -> str:
    return sha256(pattern(seed, 0, 64))


def holds(condition: dict[str, Any], **seen: Seen) -> bool:
    scope = {name: each.values for name, each in seen.items()}
    value: Any = TypeAdapter(AnyCondition).validate_python(condition)
    return judge_condition(value, Scene(PLAN, seen, scope)).holds


def filled(seed: int) -> Seen:
    return Seen({"seed": seed})


def read(seed: int, host: int | None = None) -> Seen:
    other = None if host is None else digest(host)
    return Seen(size_bytes=64, place="x", guest=digest(seed), host=other)


def test_bytes_need_all_witnesses() -> None:
    are = {"bytes": "r", "are": "f"}
    are_not = {"bytes": "r", "are_not": "f"}
    assert holds(are, r=read(1, 1), f=filled(1))
    assert holds(are, r=read(1), f=filled(1))
    assert not holds(are, r=read(2, 2), f=filled(1))
    assert holds(are_not, r=read(2, 2), f=filled(1))
    assert not holds(are_not, r=read(1, 1), f=filled(1))
    # Witnesses that disagree show nothing, either way.
    assert not holds(are, r=read(1, 2), f=filled(1))
    assert not holds(are_not, r=read(2, 1), f=filled(1))


@pytest.mark.parametrize(
    "change", [{"by": "gpu1"}, {"address": 0x9000}, {"access": "read"}, {"reason": [6]}]
)
def test_a_fault_is_requester_address_direction_and_reason(change: dict[str, Any]) -> None:
    condition = {"fault": "d", "by": "gpu0", "address": 0x1000, "access": "write"}
    window = Seen(window=FaultWindow((FAULT,), machine_watched=True), size_bytes=64)
    assert holds(condition, d=window)
    assert not holds({**condition, **change}, d=window)
    assert not holds(condition, d=Seen(window=FaultWindow((), machine_watched=True)))


def test_no_fault_needs_a_complete_log() -> None:
    condition = {"no_fault": "d"}
    assert holds(condition, d=Seen(window=FaultWindow((), machine_watched=True)))
    assert not holds(condition, d=Seen(window=FaultWindow((FAULT,), machine_watched=True)))
    assert not holds(condition, d=Seen(window=FaultWindow((), suppressed=1)))


def test_a_path_is_what_the_device_counted() -> None:
    condition = {"path": "d", "by": "peer"}
    moved = {"iommu": (8, 8), "peer": (0, 64)}
    assert holds(condition, d=Seen(moved=moved, device="gpu0", size_bytes=64))
    assert not holds(condition, d=Seen(moved={**moved, "peer": (0, 0)}, size_bytes=64))
    assert not holds({"path": "d", "by": "iommu"}, d=Seen(moved=moved, size_bytes=64))


@pytest.mark.parametrize(
    ("compared", "value", "expected"),
    [
        ({"is": 3}, 3, True),
        ({"is": 3}, 4, False),
        ({"is": 1}, True, False),
        ({"is": True}, True, True),
        ({"is": "EINVAL"}, "EINVAL", True),
        ({"is_not": "EINVAL"}, "EINVAL", False),
        ({"is_not": ""}, "EINVAL", True),
        ({"at_least": 2, "at_most": 4}, 3, True),
        ({"at_least": 4}, 3, False),
        ({"at_most": 2}, 3, False),
        ({"at_least": 1}, "many", False),
        ({"contains": "val"}, "interval", True),
        ({"contains": "vol"}, "interval", False),
        ({"is": "${s.v}"}, 3, True),
    ],
)
def test_values(compared: dict[str, Any], value: Any, expected: bool) -> None:
    assert holds({"value": "${s.v}", **compared}, s=Seen({"v": value})) is expected


def test_what_was_not_seen_does_not_hold() -> None:
    assert not holds({"value": "${s.other}", "is_not": 1}, s=Seen({"v": 1}))


def test_the_log() -> None:
    said = Seen(lines=("a DMAR fault", "b"))
    assert holds({"log": "l", "contains": "DMAR"}, l=said)
    assert not holds({"log": "l", "contains": "EDAC"}, l=said)
    assert holds({"log": "l", "lacks": "EDAC"}, l=said)
    assert not holds({"log": "l", "lacks": "DMAR", "contains": "b"}, l=said)


def test_a_living_machine_is_not_lost() -> None:
    assert not holds({"lost": "panic"})


def test_references_have_the_type_of_what_was_seen() -> None:
    scope = {"a": {"n": 16, "t": "x"}}
    assert resolve("${a.n}", scope) == 16
    assert resolve("${a.n+0x10}", scope) == 32
    assert resolve("at ${a.n} of ${a.t}", scope) == "at 16 of x"
    assert resolve({"k": ["${a.t}", 1]}, scope) == {"k": ["x", 1]}
    with pytest.raises(ReferenceFault, match="was not seen"):
        resolve("${b.n}", scope)
    with pytest.raises(ReferenceFault, match="is no number"):
        resolve("${a.t+1}", scope)


@given(st.text())
def test_any_text_has_references_or_none(text: str) -> None:
    for found in references(text):
        assert isinstance(found, Reference)
        assert found.wrong or found.name


def test_what_a_step_saw_is_not_read_for_references_again() -> None:
    assert resolve("${a.t}!", {"a": {"t": "${a.n}", "n": 1}}) == "${a.n}!"
