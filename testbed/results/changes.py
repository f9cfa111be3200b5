# SPDX-License-Identifier: Apache-2.0
"""What changed from one run to another: verdicts, environment, figures. Pure.

Verdicts are compared by requirement; a test without one, and a bug report, by name. A reason that
reads otherwise is no change: it is full of addresses. Figures that are times change with every run,
and are told only if they at least doubled or halved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from testbed.results.evidence import Counter
from testbed.results.record import RunRecord
from testbed.results.verdicts import Verdict, combine

MOST_FIGURES = 200
MOST_ROWS = 400
_TIME_UNITS = ("ns", "us", "ms", "s")
_LEAST_CHANGE = 2.0  # of a time: it doubled, or halved
_LEAST_S = 0.5  # of a requirement's duration, to be worth a line
_BAD = (Verdict.FAIL, Verdict.LOST, Verdict.ERROR)
_ABSENT = "-"


class Kind(StrEnum):
    """What became of a verdict, the worst first."""

    BROKEN = "broken"  # it passed or was skipped, and is bad now
    GONE = "gone"  # it is not in the later run
    HIDDEN = "not shown any more"  # it was judged, and is skipped now
    CHANGED = "changed"  # bad both times, otherwise
    NEW = "new"  # it was not in the earlier run
    SHOWN = "shown now"  # it was skipped, and passes
    FIXED = "fixed"  # it was bad, and passes


ORDER = tuple(Kind)


@dataclass(frozen=True)
class VerdictChange:
    """One requirement, test or report; a side that has it not has "-" and no reason."""

    name: str
    kind: Kind
    before: str
    after: str
    reason_before: str = ""
    reason_after: str = ""


@dataclass(frozen=True)
class ValueChange:
    """A value of the environment, or a figure."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Changes:
    """All that changed. ``same`` counts verdicts that did not; ``cut`` says what was left out."""

    verdicts: tuple[VerdictChange, ...]
    environment: tuple[ValueChange, ...]
    figures: tuple[ValueChange, ...]
    same: int
    cut: str = ""

    @property
    def is_same(self) -> bool:
        """No verdict changed."""
        return not self.verdicts


def changes(before: RunRecord, after: RunRecord) -> Changes:
    """What is otherwise in the later run."""
    verdicts = sorted(_verdicts(before, after), key=lambda each: ORDER.index(each.kind))
    old, new = _ends(before), _ends(after)
    environment = list(_values(_environment(before), _environment(after)))
    figures = list(_figures(before, after))
    left_out = []
    if len(environment) > MOST_ROWS:
        left_out.append(f"{len(environment) - MOST_ROWS} values of the environment")
    if len(figures) > MOST_FIGURES:
        left_out.append(f"{len(figures) - MOST_FIGURES} figures")
    return Changes(
        tuple(verdicts),
        tuple(environment[:MOST_ROWS]),
        tuple(figures[:MOST_FIGURES]),
        sum(name in new and new[name][0] == end[0] for name, end in old.items()),
        " and ".join(left_out),
    )


# --- verdicts


def _ends(record: RunRecord) -> dict[str, tuple[str, str]]:
    """By requirement or name: the verdict, or a report's word, and the reason."""
    ends: dict[str, tuple[str, str]] = {
        result.requirement: (result.verdict, result.reason) for result in record.requirements
    }
    for outcome in record.outcomes:
        if outcome.requirements:
            continue
        verdict = outcome.verdict
        if outcome.test in ends and ends[outcome.test][0] in tuple(Verdict):
            verdict = combine([Verdict(ends[outcome.test][0]), verdict])
        ends[outcome.test] = (verdict, outcome.reason)
    if len(record.reports) == len(record.outcomes):
        # `testbed repro`: FIXED and REPRODUCED say more than PASS and FAIL.
        for report, outcome in zip(record.reports, record.outcomes, strict=True):
            ends[outcome.test] = (report.word, report.reason)
    return ends


def _verdicts(before: RunRecord, after: RunRecord) -> Iterator[VerdictChange]:
    old, new = _ends(before), _ends(after)
    for name in sorted({*old, *new}):
        was, reason_was = old.get(name, (_ABSENT, ""))
        now, reason_now = new.get(name, (_ABSENT, ""))
        if was != now:
            yield VerdictChange(name, _kind(was, now), was, now, reason_was, reason_now)


def _kind(was: str, now: str) -> Kind:
    if _ABSENT in (was, now):
        return Kind.NEW if was == _ABSENT else Kind.GONE
    worth = [_worth(word) for word in (was, now)]
    if worth[0] == worth[1]:
        return Kind.CHANGED
    if worth[1] is Verdict.FAIL:
        return Kind.BROKEN
    if worth[1] is Verdict.SKIP:
        return Kind.HIDDEN
    return Kind.FIXED if worth[0] is Verdict.FAIL else Kind.SHOWN


def _worth(word: str) -> Verdict:
    """PASS, FAIL or SKIP, for each verdict and each word of a report."""
    if word in ("PASS", "FIXED"):
        return Verdict.PASS
    return Verdict.SKIP if word == "SKIP" else Verdict.FAIL


# --- the environment


def _environment(record: RunRecord) -> dict[str, str]:
    """Every value that says on what the run ran, by a name that a person understands."""
    found: dict[str, str] = {
        "testbed": record.tool_version,
        "deliberate break": record.mutation or "none",
    }
    for name, value in record.versions.items():
        if name == "packages" and isinstance(value, Mapping):
            for group, packages in value.items():
                for package in packages if isinstance(packages, list) else ():
                    if isinstance(package, Mapping):
                        key = f"package {group}/{package.get('name')}"
                        found[key] = str(package.get("version"))
        else:
            found |= dict(_flat(name.replace("_", " "), value))
    for name, value in record.host.items():
        found |= dict(_flat(f"host {name}", value))
    if record.topologies and not record.topology:
        return found | dict(_flat("topology", record.topologies))
    return found | dict(_flat("topology", record.topology))


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _flat(f"{name}[{number}]", inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, default=str)


def _values(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[ValueChange]:
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            yield ValueChange(name, old.get(name, _ABSENT), new.get(name, _ABSENT))


# --- figures


def _figures(before: RunRecord, after: RunRecord) -> Iterator[ValueChange]:
    old, new = _durations(before), _durations(after)
    for name in (name for name in old if name in new):
        longer, shorter = max(old[name], new[name]), min(old[name], new[name])
        if longer - shorter >= _LEAST_S and longer >= _LEAST_CHANGE * shorter:
            yield ValueChange(f"{name}: duration", f"{old[name]:.2f} s", f"{new[name]:.2f} s")
    counted, recounted = _counters(before), _counters(after)
    for key in (key for key in counted if key in recounted):
        was, now = counted[key], recounted[key]
        if was.value == now.value:
            continue
        if was.unit in _TIME_UNITS:
            low, high = sorted((abs(was.value), abs(now.value)))
            if high < _LEAST_CHANGE * low:
                continue
        values = [f"{each.value:,} {each.unit}".rstrip() for each in (was, now)]
        yield ValueChange(f"{key[0]}: {key[1]}", *values)


def _durations(record: RunRecord) -> dict[str, float]:
    durations: dict[str, float] = {}
    for outcome in record.outcomes:
        for name in outcome.requirements or (outcome.test,):
            durations[name] = durations.get(name, 0.0) + outcome.duration_s
    return durations


def _counters(record: RunRecord) -> dict[tuple[str, str, int], Counter]:
    """By test, name, and how often the name stood in the test's evidence before."""
    found: dict[tuple[str, str, int], Counter] = {}
    for outcome in record.outcomes:
        seen: dict[str, int] = {}
        for item in outcome.evidence:
            if isinstance(item, Counter):
                found[outcome.title, item.name, seen.setdefault(item.name, 0)] = item
                seen[item.name] += 1
    return found
