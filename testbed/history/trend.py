# SPDX-License-Identifier: Apache-2.0
"""What the history of a requirement comes to: flaky, broken, fixed, new, steady. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from testbed.history.model import Remembered

_GOOD = ("PASS", "FIXED")
_BAD = ("FAIL", "LOST", "ERROR", "REPRODUCED", "DIFFERENT")


class Trend(StrEnum):
    """One word for a history, the first that fits."""

    FLAKY = "flaky"  # good and bad on one kernel in one setting: chance decides
    BROKEN = "broken"  # bad now, good before
    FAILING = "failing"  # bad each time
    FIXED = "fixed"  # good now, bad before
    NEW = "new"  # only the newest run has it
    STEADY = "steady"  # good each time that it was judged
    UNSHOWN = "never shown"  # always skipped


@dataclass(frozen=True)
class History:
    """The runs of one requirement, oldest first, and what they come to.

    ``why``  which runs decide, in words.
    """

    name: str
    trend: Trend
    why: str
    runs: tuple[Remembered, ...]

    @property
    def counts(self) -> Mapping[str, int]:
        """How often which verdict was said."""
        verdicts = [each.result.verdict for each in self.runs]
        return {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}


def histories(remembered: Iterable[Remembered]) -> list[History]:
    """One for each name; ``remembered`` is oldest first."""
    by_name: dict[str, list[Remembered]] = {}
    keys: dict[str, None] = {}
    for each in remembered:
        by_name.setdefault(each.result.name, []).append(each)
        keys[each.run.key] = None
    newest = next(reversed(keys), "")
    found = []
    for name in sorted(by_name):
        runs = by_name[name]
        trend, why = _trend(runs, newest if len(keys) > 1 else "")
        found.append(History(name, trend, why, tuple(runs)))
    return found


def _trend(runs: Sequence[Remembered], newest: str) -> tuple[Trend, str]:
    """The worst of what it comes to on each rack; a deliberate break says nothing of the code."""
    sound = [each for each in runs if each.run.mutation in ("", "none")]
    judged = [each for each in sound if each.result.verdict in (*_GOOD, *_BAD)]
    if not judged:
        return Trend.UNSHOWN, runs[-1].result.reason
    flaky = _flaky(judged)
    if flaky:
        return Trend.FLAKY, flaky
    by_rack: dict[tuple[str, str], list[Remembered]] = {}
    for each in judged:
        by_rack.setdefault((each.run.topology, each.run.iommu), []).append(each)
    order = list(Trend)
    trend, why = min(map(_of_rack, by_rack.values()), key=lambda found: order.index(found[0]))
    if trend is Trend.STEADY and len(runs) == 1 and runs[0].run.key == newest:
        return Trend.NEW, f"{judged[0].result.verdict} {_where(judged[0])}"
    return trend, why


def _of_rack(judged: Sequence[Remembered]) -> tuple[Trend, str]:
    last = judged[-1]
    is_good = _is_good(last)
    other = next((each for each in reversed(judged) if _is_good(each) is not is_good), None)
    if other is not None:
        was, now = (
            f"{other.result.verdict} {_where(other)}",
            f"{last.result.verdict} {_where(last)}",
        )
        return (Trend.FIXED if is_good else Trend.BROKEN), f"{was}, {now}"
    runs = "1 run" if len(judged) == 1 else f"{len(judged)} runs"
    return (Trend.STEADY if is_good else Trend.FAILING), f"{runs}, last {_where(last)}"


def _flaky(judged: Sequence[Remembered]) -> str:
    """Good and bad on the same kernel, QEMU, testbed and setting."""
    groups: dict[tuple[str, ...], list[Remembered]] = {}
    for each in judged:
        run = each.run
        same = (
            run.setting,
            run.build_id,
            run.qemu,
            run.tool_version,
            run.mutation,
            run.accelerator,
        )
        groups.setdefault(same, []).append(each)
    for group in reversed(groups.values()):
        bad = [each for each in group if not _is_good(each)]
        if bad and len(bad) < len(group):
            turns = sum(_is_good(a) is not _is_good(b) for a, b in pairwise(group))
            # One turn may be a change that no version tells of; there and back is chance.
            if turns > 1:
                return f"{len(bad)} of {len(group)} runs were bad {_where(group[-1])}"
    return ""


def _is_good(each: Remembered) -> bool:
    return each.result.verdict in _GOOD


def _where(each: Remembered) -> str:
    run = each.run
    return f"on {run.topology or 'no rack'} with {run.kernel or 'an unknown kernel'}"
