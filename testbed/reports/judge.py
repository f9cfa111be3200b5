# SPDX-License-Identifier: Apache-2.0
"""From what the steps saw to REPRODUCED, FIXED or DIFFERENT. Pure.

Both expectations are judged, always: a report whose two expectations hold at once, or neither,
has not been reproduced and is not fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from guest_agent.pattern import pattern
from testbed.instruments.memory import sha256
from testbed.instruments.reasons import reasons_of
from testbed.reports.conditions import (
    BytesAre,
    Condition,
    Faulted,
    Logged,
    MachineLost,
    NoFault,
    Path,
    Values,
)
from testbed.reports.model import Report
from testbed.reports.places import find_functions
from testbed.reports.references import ReferenceFault, Scope, resolve
from testbed.reports.seen import Seen
from testbed.results.evidence import Access, Evidence, Note
from testbed.results.judging import (
    FaultWindow,
    Judgement,
    judge_bytes,
    judge_fault,
    judge_no_fault,
    judge_path,
)
from testbed.topology.plan import RackPlan

_SHOWN_LINES = 3
_LONGEST_CHARACTERS = 200


class Word(StrEnum):
    """How a report ended."""

    REPRODUCED = "REPRODUCED"
    FIXED = "FIXED"
    DIFFERENT = "DIFFERENT"
    SKIP = "SKIP"
    LOST = "LOST"
    ERROR = "ERROR"


@dataclass(frozen=True)
class Held:
    """One condition, judged. ``expectation`` is ``as_reported`` or ``when_fixed``."""

    expectation: str
    name: str
    holds: bool
    reason: str
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True)
class Scene:
    """All that conditions are judged from.

    ``console``  the console's last lines if the machine died in the steps, else None.
    """

    plan: RackPlan
    seen: Mapping[str, Seen]
    scope: Scope
    console: str | None = None


def judge(report: Report, scene: Scene) -> tuple[Held, ...]:
    """Every condition of both expectations, in the report's order."""
    return tuple(
        Held(expectation, name, judgement.holds, judgement.reason, judgement.evidence)
        for expectation, conditions in (
            ("as_reported", report.expect.as_reported),
            ("when_fixed", report.expect.when_fixed),
        )
        for name, condition in conditions.items()
        for judgement in [judge_condition(condition, scene)]
    )


def word_of(held: tuple[Held, ...]) -> tuple[Word, str]:
    """The word, and one line that says why."""
    sides = {
        side: [each for each in held if each.expectation == side]
        for side in ("as_reported", "when_fixed")
    }
    failed = {
        side: next((each for each in some if not each.holds), None) for side, some in sides.items()
    }
    reported, fixed = failed["as_reported"], failed["when_fixed"]
    if reported is None and fixed is None:
        reason = "both expectations hold: the report does not tell the bug from its absence"
        return Word.DIFFERENT, reason
    if reported is None:
        return Word.REPRODUCED, _all(sides["as_reported"])
    if fixed is None:
        return Word.FIXED, _all(sides["when_fixed"])
    return Word.DIFFERENT, (
        f"as reported, but '{reported.name}': {reported.reason};"
        f" when fixed, but '{fixed.name}': {fixed.reason}"
    )


def _all(held: list[Held]) -> str:
    return "; ".join(each.name for each in held)


def judge_condition(condition: Condition, scene: Scene) -> Judgement:
    """One condition."""
    if isinstance(condition, MachineLost):
        return _lost(condition, scene.console)
    if scene.console is not None:
        return Judgement(False, "the machine died")
    try:
        return _judge_seen(condition, scene)
    except ReferenceFault as fault:
        return Judgement(False, str(fault))


def _judge_seen(condition: Condition, scene: Scene) -> Judgement:
    match condition:
        case BytesAre():
            return _bytes(condition, scene.seen)
        case Faulted():
            return _fault(condition, scene)
        case NoFault():
            return judge_no_fault(_window(scene.seen[condition.step]))
        case Path():
            seen = scene.seen[condition.step]
            return judge_path(seen.device, seen.moved or {}, condition.by, seen.size_bytes)
        case Values():
            return _value(condition, scene.scope)
        case Logged():
            return _logged(condition, scene.seen[condition.step].lines)
    raise TypeError(f"no judge for a condition '{condition.kind}'")


def _bytes(condition: BytesAre, seen: Mapping[str, Seen]) -> Judgement:
    read = seen[condition.read]
    filled = seen[condition.are or condition.are_not or ""].values
    expected = sha256(pattern(filled["seed"], 0, read.size_bytes))
    judgement = judge_bytes(read.place, read.size_bytes, expected, guest=read.guest, host=read.host)
    if condition.are is not None:
        return judgement
    if read.host is not None and read.guest != read.host:
        return judgement
    verb = "holds" if judgement.holds else "does not hold"
    reason = f"{read.place} {verb} the bytes of '{condition.are_not}'"
    return replace(judgement, holds=not judgement.holds, reason=reason)


def _fault(condition: Faulted, scene: Scene) -> Judgement:
    seen = scene.seen[condition.step]
    node, function = find_functions(scene.plan, condition.requester)[0]
    usual = reasons_of(scene.plan.topology.nodes[node].iommu)
    access = Access(condition.access)
    unmapped = usual.unmapped_write if access is Access.WRITE else usual.unmapped_read
    address = resolve(condition.address, scene.scope)
    return judge_fault(
        _window(seen),
        requester=function.bdf,
        address=address,
        access=access,
        reasons=frozenset(condition.reasons) or unmapped,
        size_bytes=max(seen.size_bytes, 1),
    )


def _window(seen: Seen) -> FaultWindow:
    if seen.window is None:
        raise TypeError("a condition about faults of a step that is not watched")
    return seen.window


def _value(condition: Values, scope: Scope) -> Judgement:
    value = resolve(condition.value, scope)
    said = f"{condition.value} is {_shown(value)}"
    compared: list[tuple[bool, str]] = []
    if condition.equal is not None:
        wanted = resolve(condition.equal, scope)
        compared.append((matches(value, wanted), f"not {_shown(wanted)}"))
    if condition.unequal is not None:
        wanted = resolve(condition.unequal, scope)
        compared.append((not matches(value, wanted), "which it must not be"))
    if condition.least is not None or condition.most is not None:
        compared += _bounds(value, condition, scope)
    if condition.part is not None:
        compared.append((condition.part in str(value), f"without '{condition.part}' in it"))
    wrong = next((words for holds, words in compared if not holds), "")
    return Judgement(not wrong, f"{said}, {wrong}" if wrong else said, (Note(said),))


def _bounds(value: Any, condition: Values, scope: Scope) -> list[tuple[bool, str]]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [(False, "no number")]
    least = resolve(condition.least, scope)
    most = resolve(condition.most, scope)
    return [
        (least is None or value >= least, f"less than {least}"),
        (most is None or value <= most, f"more than {most}"),
    ]


def matches(value: Any, wanted: Any) -> bool:
    """As in a step's `expect`: equal, and true is not 1."""
    return isinstance(value, bool) is isinstance(wanted, bool) and bool(value == wanted)


def _logged(condition: Logged, lines: tuple[str, ...]) -> Judgement:
    if condition.missing is not None:
        said = [line for line in lines if condition.missing in line]
        if said:
            return Judgement(False, f"the kernel logged: {said[0]}", _notes(said))
    if condition.part is None:
        return Judgement(True, f"the kernel did not log '{condition.missing}'")
    said = [line for line in lines if condition.part in line]
    if not said:
        return Judgement(False, f"the kernel did not log '{condition.part}'", _notes(list(lines)))
    return Judgement(True, f"the kernel logged: {said[0]}", _notes(said))


def _notes(lines: list[str]) -> tuple[Evidence, ...]:
    return tuple(Note(f"kernel: {line}") for line in lines[:_SHOWN_LINES])


def _lost(condition: MachineLost, console: str | None) -> Judgement:
    if console is None:
        return Judgement(False, "the machine lives")
    line = next((line for line in console.splitlines() if condition.part in line), None)
    if line is None:
        return Judgement(False, f"the console's end does not say '{condition.part}'")
    return Judgement(True, f"the machine died: {line.strip()}", (Note(f"console: {line.strip()}"),))


def _shown(value: Any) -> str:
    text = hex(value) if isinstance(value, int) and not isinstance(value, bool) else repr(value)
    if isinstance(value, int) and not isinstance(value, bool) and value < 1 << 16:
        text = str(value)
    return text if len(text) <= _LONGEST_CHARACTERS else text[: _LONGEST_CHARACTERS - 3] + "..."
