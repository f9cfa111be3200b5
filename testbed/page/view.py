# SPDX-License-Identifier: Apache-2.0
"""A run's record as the page shows it: what is said of each requirement, and when it was tested."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any
from urllib.parse import urlsplit

from testbed.results.evidence import (
    BytesChecked,
    Counter,
    Evidence,
    FaultSeen,
    MappingUsed,
    NoFaultSeen,
    Note,
    Witness,
)
from testbed.results.verdicts import Outcome, Verdict, combine

MOST_ROWS = 200  # of one kind of evidence of one test
MOST_TEXT = 16_000  # characters of a traceback or a console's tail
MOST_TIME = 1e15  # of any unit; larger is no time, and neither is NaN
MOST_CALLS = 80  # of one test
_ROUNDED_S = 0.005  # the times in a record have whole milliseconds
WORST_FIRST = (Verdict.FAIL, Verdict.LOST, Verdict.ERROR, Verdict.SKIP, Verdict.PASS)


@dataclass(frozen=True)
class BytesRow:
    """One range as all its witnesses read it."""

    place: str
    size_bytes: int
    expected: str
    seen: tuple[tuple[Witness, bool, str], ...]


@dataclass(frozen=True)
class FaultRow:
    """Equal fault records as one row; ``name`` is the requester's in the topology, if known."""

    fault: FaultSeen
    name: str
    count: int


@dataclass(frozen=True)
class Call:
    """One call of a machine's agent; ``start_s`` counts from the test's start."""

    node: str
    method: str
    start_s: float
    duration_s: float
    error: str


@dataclass(frozen=True)
class TestView:
    """One test: its outcome, its evidence by kind, and what was asked of its machines.

    ``cut``    what was left out, in words.
    ``calls``  of the machines' agents while it ran, in order; empty if nobody noted when.
    """

    outcome: Outcome
    anchor: str
    faults: tuple[FaultRow, ...] = ()
    quiet: tuple[str, ...] = ()
    ranges: tuple[BytesRow, ...] = ()
    mappings: tuple[MappingUsed, ...] = ()
    figures: tuple[Counter, ...] = ()
    notes: tuple[str, ...] = ()
    cut: str = ""
    calls: tuple[Call, ...] = ()

    @property
    def is_good(self) -> bool:
        """It says nothing that a reader must look at."""
        return self.outcome.verdict in (Verdict.PASS, Verdict.SKIP)


@dataclass(frozen=True)
class RequirementView:
    """All tests of one requirement, or a test that has none."""

    title: str
    verdict: Verdict
    reason: str
    tests: tuple[TestView, ...]
    anchor: str
    duration_s: float = 0.0
    words: str = ""  # what the filter looks at

    @property
    def counts(self) -> Mapping[Verdict, int]:
        """How many tests ended how."""
        ends = [test.outcome.verdict for test in self.tests]
        return {verdict: ends.count(verdict) for verdict in Verdict if verdict in ends}


@dataclass
class Anchors:
    """Names for places in the page, unique and made of letters, digits and dashes."""

    taken: set[str] = field(default_factory=set)

    def new(self, *words: str) -> str:
        """One that was not given out yet."""
        base = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(words))[:80].strip("-").lower() or "x"
        name, number = base, 2
        while name in self.taken:
            name, number = f"{base}-{number}", number + 1
        self.taken.add(name)
        return name


def requirement_views(
    outcomes: Sequence[Outcome],
    anchors: Anchors,
    names: Mapping[str, str],
    calls: Mapping[int, Sequence[Call]],
) -> list[RequirementView]:
    """Every requirement, in order of identifiers, then tests of none.

    :param names: what stands at an address of the rack, ``0000:03:00.1`` → ``gpu0.engine``.
    :param calls: what was asked of machines in each test, by its position.
    """
    groups: dict[tuple[bool, str], list[int]] = {}
    for position, outcome in enumerate(outcomes):
        for requirement in outcome.requirements or ("",):
            groups.setdefault((not requirement, requirement or outcome.test), []).append(position)
    views = []
    for (_, title), positions in sorted(groups.items(), key=lambda item: item[0]):
        group = [outcomes[position] for position in positions]
        verdict = combine(outcome.verdict for outcome in group)
        reason = next(outcome.reason for outcome in group if outcome.verdict is verdict)
        anchor = anchors.new("r", title)
        tests = tuple(
            view_of_test(each, anchors.new("t", title, each.test), names, calls.get(position, ()))
            for position, each in zip(positions, group, strict=True)
        )
        words = " ".join([title, verdict, *(o.test for o in group), *(o.reason for o in group)])
        duration_s = sum(outcome.duration_s for outcome in group)
        views.append(
            RequirementView(title, verdict, reason, tests, anchor, duration_s, words.lower()[:600])
        )
    return views


def view_of_test(
    outcome: Outcome, anchor: str, names: Mapping[str, str], calls: Sequence[Call]
) -> TestView:
    """One outcome with its evidence sorted by kind."""
    by_kind: dict[str, list[Evidence]] = {}
    for item in outcome.evidence:
        by_kind.setdefault(item.kind, []).append(item)
    faults = list(_fault_rows(outcome.evidence, names))
    ranges = list(_byte_rows(outcome.evidence))
    mappings = [item for item in outcome.evidence if isinstance(item, MappingUsed)]
    figures = [item for item in outcome.evidence if isinstance(item, Counter)]
    notes = [item.text for item in outcome.evidence if isinstance(item, Note)]
    quiet = dict.fromkeys(str(i) for i in outcome.evidence if isinstance(i, NoFaultSeen))
    kinds: tuple[Sized, ...] = (faults, ranges, mappings, figures, notes)
    longest = max(map(len, kinds))
    cut = f"only the first {MOST_ROWS} of each kind of evidence are shown"
    return TestView(
        outcome,
        anchor,
        tuple(faults[:MOST_ROWS]),
        tuple(quiet),
        tuple(ranges[:MOST_ROWS]),
        tuple(mappings[:MOST_ROWS]),
        tuple(figures[:MOST_ROWS]),
        tuple(notes[:MOST_ROWS]),
        cut if longest > MOST_ROWS else "",
        tuple(calls),
    )


def _fault_rows(evidence: Sequence[Evidence], names: Mapping[str, str]) -> Iterator[FaultRow]:
    counted: dict[FaultSeen, int] = {}
    for item in evidence:
        if isinstance(item, FaultSeen):
            counted[item] = counted.get(item, 0) + 1
    for fault, count in counted.items():
        yield FaultRow(fault, names.get(fault.requester, ""), count)


def _byte_rows(evidence: Sequence[Evidence]) -> Iterator[BytesRow]:
    """Neighbours about the same range become one row with several witnesses."""
    row: BytesRow | None = None
    for item in evidence:
        if not isinstance(item, BytesChecked):
            continue
        seen = (item.witness, item.equal, item.sha256)
        same = row is not None and (row.place, row.size_bytes, row.expected) == (
            item.place,
            item.size_bytes,
            item.expected_sha256,
        )
        if row is not None and same and item.witness not in [each[0] for each in row.seen]:
            row = BytesRow(row.place, row.size_bytes, row.expected, (*row.seen, seen))
            continue
        if row is not None:
            yield row
        row = BytesRow(item.place, item.size_bytes, item.expected_sha256, (seen,))
    if row is not None:
        yield row


def number(value: object) -> float | None:
    """A time as a stranger wrote it, if it is one that can be reckoned with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < MOST_TIME else None


def safe_link(address: str) -> str:
    """The address if a page may link to it: http or https with a host. Else ""."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    return address if parts.scheme in ("http", "https") and parts.netloc else ""


def shortened(text: str, most: int = MOST_TEXT) -> tuple[str, int]:
    """The end of a long text, which says most, and how many characters went before it."""
    return (text, 0) if len(text) <= most else (text[-most:], len(text) - most)


# --- time


def calls_by_test(
    outcomes: Sequence[Outcome], made: Iterable[tuple[float, str, Mapping[str, Any]]]
) -> dict[int, list[Call]]:
    """The calls of each test by its position: those between its start and the next one's.

    A session runs its tests one after the other. Calls before the first test belong to none.

    :param made: each call's time, its node, and what was noted of it; in any order.
    """
    starts = sorted((o.started_s, position) for position, o in enumerate(outcomes) if o.started_s)
    found: dict[int, list[Call]] = {}
    for at_s, node, call in sorted(made, key=itemgetter(0)):
        before = bisect_right(starts, (at_s + _ROUNDED_S, len(outcomes))) - 1
        if before < 0:
            continue
        started_s, position = starts[before]
        calls = found.setdefault(position, [])
        if len(calls) > MOST_CALLS:
            continue
        error = call.get("error")
        said = str(error.get("message", "failed")) if isinstance(error, dict) else ""
        spent_s = number(call.get("elapsed_s")) or 0.0
        since_s = max(0.0, at_s - started_s)
        calls.append(Call(node, str(call.get("method"))[:80], since_s, spent_s, said[:300]))
    return found


@dataclass(frozen=True)
class Bar:
    """A test in the timeline; ``start_s`` counts from the first test's start."""

    test: TestView
    start_s: float
    duration_s: float
    lane: int


@dataclass(frozen=True)
class Timeline:
    """All tests in time; ``exact`` if the record says when each began."""

    bars: tuple[Bar, ...]
    length_s: float
    lanes: int
    exact: bool

    @property
    def slowest(self) -> tuple[Bar, ...]:
        """The five that took longest."""
        return tuple(sorted(self.bars, key=lambda bar: -bar.duration_s)[:5])


def timeline(requirements: Sequence[RequirementView]) -> Timeline:
    """The tests of a run, each once; side by side where several ran at once."""
    each = {id(test.outcome): test for view in reversed(requirements) for test in view.tests}
    tests = list(each.values())
    exact = bool(tests) and all(test.outcome.started_s for test in tests)
    if not exact:
        return _one_after_another(tests)
    first_s = min(test.outcome.started_s for test in tests)
    ends: list[float] = []
    bars = []
    for test in sorted(tests, key=lambda each: each.outcome.started_s):
        start_s = test.outcome.started_s - first_s
        lane = next((n for n, end in enumerate(ends) if end <= start_s + _ROUNDED_S), len(ends))
        ends[lane : lane + 1] = [start_s + test.outcome.duration_s]
        bars.append(Bar(test, start_s, test.outcome.duration_s, lane))
    return Timeline(tuple(bars), max([*ends, 0.001]), max(1, len(ends)), exact=True)


def _one_after_another(tests: Sequence[TestView]) -> Timeline:
    at_s = 0.0
    bars = []
    for test in tests:
        bars.append(Bar(test, at_s, test.outcome.duration_s, 0))
        at_s += test.outcome.duration_s
    return Timeline(tuple(bars), max(at_s, 0.001), 1, exact=False)
