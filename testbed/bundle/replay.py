# SPDX-License-Identifier: Apache-2.0
"""A bundle happens again: its report or its suites, on a rack made from its topology."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from testbed import __version__, deploy, run_products
from testbed.bundle import compare
from testbed.bundle.compare import Difference, Here
from testbed.bundle.scrub import scrubber
from testbed.bundle.tell import Told, Wanted
from testbed.errors import ExitCode
from testbed.host import facts, places, prepare, probe
from testbed.reports.judge import Word
from testbed.reports.load import Case
from testbed.reports.outcome import exit_code
from testbed.reports.reproduce import Finding
from testbed.reports.runner import run_reports
from testbed.results import options as run_options
from testbed.topology.model import Topology, to_data

ARGV_DIFF = "commands.diff"

Install = Callable[[Topology, str | None], prepare.Installation]


@dataclass(frozen=True)
class Replayed:
    """How a replay ended; ``finding`` of a report, ``changes`` in a run's verdicts."""

    word: Word
    reason: str
    code: ExitCode
    differences: tuple[Difference, ...]
    commands: tuple[str, ...]
    changes: tuple[Difference, ...] = ()
    finding: Finding | None = None


def replay(
    told: Told,
    run_dir: Path,
    wanted: Wanted,
    install: Install,
    *,
    command: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda _: None,
    differs: Callable[[Difference], None] = lambda _: None,
) -> Replayed:
    """Run it here.

    :param run_dir: an existing folder for all that the replay leaves.
    :param install: makes or finds QEMU, image and kernels for the topology.
    :param differs: is told of each difference before anything starts.
    """
    qemu = told.case.qemu if told.case is not None else wanted.overrides.qemu
    installation = install(told.topology, qemu)
    accelerator = probe.accelerator(installation)
    here = Here(
        __version__,
        run_products.versions_of(installation, accelerator),
        facts.host_facts(),
        to_data(told.topology),
    )
    differences = compare.environment(told.record, here)
    for each in differences:
        differs(each)
    start = deploy.StartOptions(
        installation=installation, accelerator=accelerator, trust=wanted.trust
    )
    if told.case is not None:
        return _report(told, told.case, run_dir, wanted, start, differences, command, say)
    return _run(told, run_dir, wanted, start, differences, command)


def _report(
    told: Told,
    case: Case,
    run_dir: Path,
    wanted: Wanted,
    start: deploy.StartOptions,
    differences: tuple[Difference, ...],
    command: tuple[str, ...],
    say: Callable[[str], None],
) -> Replayed:
    from testbed.harness.sources import TopologySource  # noqa: PLC0415

    findings, _ = run_reports(
        [case],
        run_dir,
        lambda each, folder: TopologySource(each.topology, folder, options=start, say=say),
        expect=wanted.expect,
        command=command,
        say=say,
    )
    word = findings[0].word
    return Replayed(
        word,
        findings[0].reason,
        exit_code([word], wanted.expect),
        differences,
        _commands(told, run_dir),
        finding=findings[0],
    )


def _run(
    told: Told,
    run_dir: Path,
    wanted: Wanted,
    start: deploy.StartOptions,
    differences: tuple[Difference, ...],
    command: tuple[str, ...],
) -> Replayed:
    from testbed.harness import runner  # noqa: PLC0415  pytest; only of runs
    from testbed.harness.sources import TopologySource, engine_sources  # noqa: PLC0415
    from testbed.instruments.mutations import parse_mutation  # noqa: PLC0415

    asked = told.options
    choice = runner.Choice(
        asked.suites,
        asked.keyword,
        parse_mutation(asked.mutation or "none"),
        policy=asked.policy,
        pristine=asked.pristine,
    )
    start = dataclasses.replace(start, warm=asked.pristine)
    # KTAP would say ok to what must be as it was; the record has all of it.
    stream = io.StringIO()
    if asked.engine == run_options.ALL_ENGINES and wanted.overrides.engine is None:
        sources = engine_sources(told.topology, run_dir, start)
        result = runner.run_engines(choice, sources, run_dir, stream=stream, command=command)
    else:
        source = TopologySource(told.topology, run_dir, options=start)
        result = runner.run_suites(choice, source, run_dir, stream=stream, command=command)
    word, reason = compare.word_of(told.record, result.record)
    code = compare.code_of(word, told.record, wanted.expect)
    if result.code is ExitCode.INTERRUPTED:
        code = result.code
    return Replayed(
        word,
        reason,
        code,
        differences,
        _commands(told, run_dir),
        compare.changes(told.record, result.record),
    )


def _commands(told: Told, run_dir: Path) -> tuple[str, ...]:
    """How QEMU's command lines differ, rack by rack; kept in the run folder too."""
    scrub = scrubber(places.places(run_dir))
    found: list[str] = []
    for name, content in sorted(told.bundle.members.items()):
        if name.rpartition("/")[2] != run_products.COMMANDS_JSON:
            continue
        try:
            ours = json.loads(scrub((run_dir / name).read_bytes()))
            theirs = json.loads(content)
        except (OSError, ValueError, RecursionError):
            continue
        found += [f"{name}: {line}" for line in compare.command_lines(theirs, ours)]
    (run_dir / ARGV_DIFF).write_text("".join(f"{line}\n" for line in found))
    return tuple(found)
