# SPDX-License-Identifier: Apache-2.0
"""Suites run on racks of the tests' own, and what they said."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from testbed import deploy
from testbed.errors import ExitCode
from testbed.harness.runner import Choice, RunResult, run_suites
from testbed.harness.sources import TopologySource
from testbed.instruments.interface import RackSource
from testbed.instruments.mutations import Mutation
from testbed.rack import Rack
from testbed.results.record import RunRecord
from testbed.results.verdicts import Outcome, Verdict, by_requirement
from testbed.run_products import COMMANDS_JSON
from testbed.topology.model import Topology


@dataclass(frozen=True)
class Ran:
    """A run that ended: its record, and what it printed."""

    result: RunResult
    ktap: str

    @property
    def code(self) -> ExitCode:
        return self.result.code

    @property
    def record(self) -> RunRecord:
        return self.result.record

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return self.result.record.outcomes

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """By requirement."""
        return verdicts_of(self.outcomes)

    @property
    def by_title(self) -> dict[str, Verdict]:
        """By test: what two runs on equal racks have in common."""
        return {outcome.title: outcome.verdict for outcome in self.outcomes}

    @property
    def failed(self) -> set[str]:
        """The requirements that ended FAIL."""
        return {name for name, verdict in self.verdicts.items() if verdict is Verdict.FAIL}


def verdicts_of(outcomes: Iterable[Outcome]) -> dict[str, Verdict]:
    """What these tests together say of each requirement."""
    return {each.requirement: each.verdict for each in by_requirement(outcomes)}


def run(
    suite: str | Path | Sequence[str | Path],
    source: RackSource,
    folder: Path,
    keyword: str = "",
    mutation: Mutation = Mutation.NONE,
    **more: Any,
) -> Ran:
    """Run a suite or a file of tests, or several in one session, which share their racks.

    :param folder: an existing one for all that it leaves.
    :param more: of :class:`testbed.harness.runner.Choice`.
    """
    stream = io.StringIO()
    suites = [suite] if isinstance(suite, str | Path) else suite
    choice = Choice([str(each) for each in suites], keyword, mutation, **more)
    result = run_suites(choice, source, folder, stream=stream, console=Console(file=io.StringIO()))
    return Ran(result, stream.getvalue())


def was_restored(rack: Rack) -> bool:
    """Whether its machines come from a file, by the commands that started them."""
    return '"-incoming"' in (rack.run_dir / COMMANDS_JSON).read_text()


class RestoringSource(TopologySource):
    """Restores the rack; variants of it, which no other run wants, boot."""

    def __init__(self, topology: Topology, run_dir: Path, options: deploy.StartOptions) -> None:
        super().__init__(topology, run_dir, options=options)
        self._main = TopologySource(topology, run_dir, options=replace(options, warm=True))

    def start(self, topology: Topology, label: str, *, disks: bool = True) -> Any:
        if topology is self.topology:
            return self._main.start(topology, label, disks=disks)
        return super().start(topology, label, disks=disks)


class Borrowed:
    """A rack that a run may use, but not end."""

    def __init__(self, rack: Rack) -> None:
        self._rack = rack

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rack, name)

    def close(self) -> None:
        """It belongs to the tests that lent it."""


class BorrowingSource(TopologySource):
    """Hands out one rack for all runs, and starts variants of it by its own options."""

    restartable = False

    def __init__(self, rack: Rack, run_dir: Path, options: deploy.StartOptions) -> None:
        super().__init__(rack.topology, run_dir, options=options)
        self._borrowed = Borrowed(rack)

    def start(self, topology: Topology, label: str, *, disks: bool = True) -> Any:
        if topology is self.topology:
            return self._borrowed
        return super().start(topology, label, disks=disks)


class HandingOver(TopologySource):
    """Gives a rack away that runs already: who has it ends it, and restarts its nodes."""

    def __init__(self, rack: Rack, run_dir: Path, options: deploy.StartOptions) -> None:
        super().__init__(rack.topology, run_dir, options=options)
        self._left = [rack]

    def start(self, topology: Topology, label: str, *, disks: bool = True) -> Any:
        if topology is self.topology and self._left:
            return self._left.pop()
        return super().start(topology, label, disks=disks)
