# SPDX-License-Identifier: Apache-2.0
"""Logs, folded: which lines matter, which test they belong to, and what was left out. Pure.

A log is kept in whole if it is short. Of a longer one its beginning, its end, and every line that
matters (a fault, an oops, a warning) with its neighbours are kept, up to a bound; the rest becomes
folds that say how many lines are behind them and, if they are not in the page at all, that too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

from testbed.machine.console import MAX_LINE_CHARACTERS, plain_text

CONTEXT_LINES = 3
END_LINES = 12  # at the beginning and at the end of every log
MOST_LINES = 1500  # of one log in the page
MOST_LIT = 300


class Kind(StrEnum):
    """Why a line is lit."""

    OOPS = "oops"
    FAULT = "fault"
    WARNING = "warning"
    MARK = "mark"  # no line of the log's: a test begins


# What Linux prints: kernel/panic.c, lib/bug.c, arch/x86/mm/fault.c, kernel/watchdog.c,
# mm/kasan/report.c; drivers/iommu/intel/dmar.c, drivers/iommu/amd/iommu.c,
# drivers/iommu/virtio-iommu.c. What QEMU prints: hw/i386/trace-events, hw/virtio/trace-events.
_PATTERNS = (
    (
        Kind.OOPS,
        re.compile(
            r"Kernel panic|\bBUG: |\bOops: |kernel BUG at |general protection fault|Call Trace:"
            r"|stack segment: |KASAN|soft lockup|hard LOCKUP|Out of memory|blocked for more than"
            r"|rcu: INFO: .*stall"
        ),
    ),
    (
        Kind.FAULT,
        re.compile(
            r"DMAR: .*fault|AMD-Vi: .*(?:IO_PAGE_FAULT|Event logged)|IOMMU fault|page fault from"
            r"|vtd_dmar_fault|amdvi_page_fault|virtio_iommu_report_fault|\bfault addr\b"
        ),
    ),
    (
        Kind.WARNING,
        re.compile(r"\bWARNING: |\bwarning\b|\btaint|AER: |\b(?:e|E)rror\b|\bfailed\b|timed out"),
    ),
)


@dataclass(frozen=True)
class Line:
    """One line of a log; ``number`` counts from 1, ``kind`` is None for an ordinary one."""

    number: int
    text: str
    kind: Kind | None = None


@dataclass(frozen=True)
class Fold:
    """Lines that are folded away. ``missing`` of them are not in the page at all."""

    lines: tuple[Line, ...]
    missing: int = 0

    @property
    def count(self) -> int:
        """How many lines it stands for."""
        return len(self.lines) + self.missing


@dataclass(frozen=True)
class Mark:
    """A test began when the log had ``offset_bytes``, and ended when it had ``end_bytes``."""

    offset_bytes: int
    end_bytes: int
    title: str
    anchor: str


@dataclass(frozen=True)
class LogView:
    """A log as it is shown: lines and folds in order.

    ``cut``  what was left out, in words, or "".
    ``lit``  how many lines are lit, by kind.
    """

    name: str
    parts: tuple[Line | Fold | Mark, ...]
    total_lines: int
    cut: str
    lit: dict[Kind, int]

    @property
    def blocks(self) -> list[tuple[str, list[Line | Fold | Mark]]]:
        """Neighbours of one type together, each with the name of the type."""
        grouped = groupby(self.parts, key=lambda part: type(part).__name__)
        return [(name, list(parts)) for name, parts in grouped]


def classify(text: str) -> Kind | None:
    """Why this line matters, or None."""
    for kind, pattern in _PATTERNS:
        if pattern.search(text):
            return kind
    return None


def view(
    name: str,
    head: bytes,
    tail: bytes = b"",
    cut_bytes: int = 0,
    marks: Sequence[Mark] = (),
) -> LogView:
    """Fold one log.

    :param head: its beginning, or all of it; ``tail`` its end, ``cut_bytes`` what lies between.
    :param marks: where tests began, in order of place.
    """
    lines, offsets = _lines(head, 0, 1)
    first_of_tail = len(lines)
    if tail:
        # The first line of the end is half a line: nobody knows how it began.
        begin = tail.find(b"\n") + 1
        more, places = _lines(tail[begin:], len(head) + cut_bytes + begin, len(lines) + 1)
        lines += more
        offsets += places
    kept = _kept(lines, first_of_tail if tail else -1)
    placed = _placed(marks, offsets, len(lines))
    parts = tuple(_parts(lines, kept, placed))
    missing = sum(part.missing for part in parts if isinstance(part, Fold))
    said = []
    if cut_bytes:
        said.append(f"{cut_bytes:,} bytes in its middle were not read")
    if missing:
        said.append(f"{missing:,} of {len(lines):,} lines read are left out")
    counts = {kind: sum(line.kind is kind for line in lines) for kind in Kind}
    return LogView(name, parts, len(lines), "; ".join(said), {k: n for k, n in counts.items() if n})


def _lines(data: bytes, offset: int, number: int) -> tuple[list[Line], list[int]]:
    lines, offsets = [], []
    for position, raw in enumerate(data.splitlines(keepends=True)):
        text = plain_text(raw)
        if len(text) > MAX_LINE_CHARACTERS:
            text = f"{text[:MAX_LINE_CHARACTERS]} … ({len(text):,} characters)"
        lines.append(Line(number + position, text, classify(text)))
        offsets.append(offset)
        offset += len(raw)
    return lines, offsets


def _kept(lines: Sequence[Line], seam: int) -> set[int]:
    """Positions of lines that are shown unfolded."""
    kept = {*range(min(END_LINES, len(lines))), *range(max(0, len(lines) - END_LINES), len(lines))}
    if seam >= 0:
        kept |= {at for at in (seam - 1, seam) if 0 <= at < len(lines)}
    lit = [at for at, line in enumerate(lines) if line.kind is not None]
    # The worst first, should there be more than fit: an oops is never left out for a warning.
    order = list(Kind)
    lit.sort(key=lambda at: (order.index(lines[at].kind or Kind.MARK), at))
    for at in lit[:MOST_LIT]:
        kept |= set(range(max(0, at - CONTEXT_LINES), min(len(lines), at + CONTEXT_LINES + 1)))
    return kept


def _placed(marks: Sequence[Mark], offsets: Sequence[int], count: int) -> dict[int, list[Mark]]:
    """Marks of tests during which something was logged, by the line that they stand before."""
    placed: dict[int, list[Mark]] = {}
    for mark in marks:
        inside = [at for at in range(count) if mark.offset_bytes <= offsets[at] < mark.end_bytes]
        if inside:
            placed.setdefault(inside[0], []).append(mark)
    return placed


def _parts(
    lines: Sequence[Line], kept: set[int], marks: dict[int, list[Mark]]
) -> Iterator[Line | Fold | Mark]:
    """In order; the bound counts folded lines, which nobody misses first."""
    room = max(0, MOST_LINES - len(kept))
    at = 0
    while at < len(lines):
        yield from marks.get(at, ())
        if at in kept:
            yield lines[at]
            at += 1
            continue
        end = at + 1
        while end < len(lines) and end not in kept and end not in marks:
            end += 1
        shown = min(room, end - at)
        room -= shown
        yield Fold(tuple(lines[at : at + shown]), end - at - shown)
        at = end
