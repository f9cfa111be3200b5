# SPDX-License-Identifier: Apache-2.0
"""`testbed run -j N`: suites, racks and engines that can run apart, as processes of their own.

The same parts run one after the other with ``-j 1``, and what comes out is the same: KTAP, record
and table are in the order of the command line, whichever part ended first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from testbed.errors import ExitCode
from testbed.harness.engines import AGREEMENT, agreement, labelled
from testbed.host.facts import host_facts
from testbed.matrix import child
from testbed.matrix.display import shown
from testbed.matrix.needs import Need, Room
from testbed.matrix.pool import Pool
from testbed.matrix.run_cell import judged
from testbed.results import junit, record
from testbed.results.ktap import KtapStream
from testbed.results.table import print_table
from testbed.results.verdicts import Outcome, Verdict, combine

# A part's tests have deadlines of their own; this ends what hangs in spite of them.
DEADLINE_S = 6 * 3600.0


@dataclass(frozen=True)
class Part:
    """What runs in one process.

    ``words``   for `testbed run`, all but ``--output`` and ``--format``.
    ``group``   what its outcomes are compared with, if engines are: the label without the engine.
    ``weight``  how long it will take against the others, as far as that can be told; the longest
        begin first, so that no long one is left alone at the end.
    """

    label: str
    words: tuple[str, ...]
    need: Need
    group: str = ""
    engine: str = ""
    weight: int = 1


@dataclass
class _Ended:
    outcomes: list[Outcome]
    run: record.RunRecord | None = None
    duration_s: float = 0.0


@dataclass
class Apart:
    """A run of several parts in ``run_dir``, each with a folder of its own below it.

    ``note``  is told the folder of each part that has a record.
    """

    parts: Sequence[Part]
    run_dir: Path
    room: Room
    command: Sequence[str]
    mutation: str = ""
    note: Callable[[Path], None] = lambda _: None
    _ended: dict[str, _Ended] = field(default_factory=dict)
    _told: int = 0

    def run(self, stream: TextIO, console: Console | None = None) -> ExitCode:
        """Run all, write the record, and say how it ended."""
        started, began_s = datetime.now(UTC), time.monotonic()
        ktap = KtapStream(stream)
        groups = list(dict.fromkeys(part.group for part in self.parts if part.group))
        ktap.plan(len(self.parts) + len(groups))
        code = None
        with shown(len(self.parts)) as display:
            display.say(self.room.words([part.need for part in self.parts]))
            pool = Pool(
                self.room,
                lambda part: part.need,
                self._work,
                on_start=lambda part: display.started(part.label),
            )
            try:
                order = sorted(self.parts, key=lambda part: (-part.need.cores, -part.weight))
                for part, ended in pool.results(order):
                    if ended is None:
                        continue
                    self._ended[part.label] = ended
                    if ended.run is not None:
                        self.note(self.run_dir / part.label)
                    verdict = combine(o.verdict for o in ended.outcomes)
                    first = next(o for o in ended.outcomes if o.verdict is verdict)
                    reason = "" if verdict is Verdict.PASS else f"{first.title}: {first.reason}"
                    display.ended(part.label, verdict, reason, ended.duration_s)
                    self._tell(ktap)
            except KeyboardInterrupt:
                code = ExitCode.INTERRUPTED
        agreed = [] if code else self._agreements(groups)
        for outcome in agreed:
            ktap.outcome(outcome)
        ktap.end("interrupted" if code else "")
        written = self._record(agreed, started, time.monotonic() - began_s, code)
        record.write_record(written, self.run_dir / record.FILE_NAME)
        junit.write_junit(written, self.run_dir / junit.FILE_NAME)
        print_table(written, self.run_dir, console or Console(stderr=True))
        return ExitCode(written.exit_code)

    def _work(self, part: Part, cancelled: Callable[[], bool]) -> _Ended | None:
        folder = self.run_dir / part.label
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        words = [*part.words, "--output", str(folder), "--format", "json"]
        try:
            end = child.run(words, folder, deadline_s=DEADLINE_S, cancelled=cancelled)
        except OSError as error:
            return _Ended([Outcome((), "run", Verdict.ERROR, f"could not be started: {error}")])
        if end.why == "cancelled":
            return None
        if end.why == "deadline":
            reason = f"it did not end within {DEADLINE_S:.0f} s, and was ended"
            return _Ended([Outcome((), "run", Verdict.ERROR, reason)], None, end.duration_s)
        verdict, reason, run = judged(end, folder)
        if run is None or not run.outcomes:
            return _Ended([Outcome((), "run", verdict, reason)], None, end.duration_s)
        return _Ended(list(run.outcomes), run, end.duration_s)

    def _tell(self, ktap: KtapStream) -> None:
        """KTAP of what has ended, as far as everything before it has."""
        while self._told < len(self.parts):
            ended = self._ended.get(self.parts[self._told].label)
            if ended is None:
                return
            ktap.parts(self.parts[self._told].label, ended.outcomes)
            self._told += 1

    def _agreements(self, groups: Sequence[str]) -> list[Outcome]:
        found = []
        for group in groups:
            said = {p.engine: self._ended[p.label].outcomes for p in self.parts if p.group == group}
            outcome = agreement(said)
            found.append(replace(outcome, test=f"{group}/{AGREEMENT}"))
        return found

    def _record(
        self,
        agreed: Sequence[Outcome],
        started: datetime,
        duration_s: float,
        code: ExitCode | None,
    ) -> record.RunRecord:
        ended = [(p.label, self._ended[p.label]) for p in self.parts if p.label in self._ended]
        runs = [(label, each.run) for label, each in ended if each.run is not None]
        outcomes = [o for label, each in ended for o in labelled(label, each.outcomes)]
        topologies = {label: run.topology for label, run in runs}
        first = next(iter(topologies.values()), {})
        info = record.RunInfo(
            command=tuple(self.command),
            started=started.isoformat(timespec="seconds"),
            versions=_versions([run for _, run in runs]),
            host=host_facts(),
            topology=first if all(each == first for each in topologies.values()) else {},
            topologies=topologies,
            mutation=self.mutation,
            devices=tuple(
                replace(device, rack=f"{label}/{device.rack}")
                for label, run in runs
                for device in run.devices
            ),
            reports=tuple(r for _, run in runs for r in run.reports),
        )
        return record.make_record(info, (*outcomes, *agreed), duration_s=duration_s, code=code)


def _versions(runs: Sequence[record.RunRecord]) -> dict[str, Any]:
    """What all of them used; racks may have different kernels."""
    found: dict[str, Any] = {}
    kernels: dict[str, Any] = {}
    for run in runs:
        kernels |= run.versions.get("kernels", {})
        found = {**run.versions, **found}
    return found | ({"kernels": kernels} if kernels else {})
