# SPDX-License-Identifier: Apache-2.0
"""A bundle happens again: its report or its suites, on a rack made from its topology.

Of the bundle only its topology, its report and the names of its suites are used, and these only
as a stranger's topology and report would be. No command line of it is run, no code is in it.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from testbed import __version__, deploy
from testbed.bundle import compare
from testbed.bundle.archive import Bundle
from testbed.bundle.compare import Difference, Here
from testbed.bundle.scrub import scrubber
from testbed.errors import CapabilityMissing, Diagnostic, ExitCode, InputError
from testbed.host import facts, places, prepare, probe
from testbed.reports import load, strangers
from testbed.reports.judge import Word
from testbed.reports.load import Case, Overrides
from testbed.reports.outcome import exit_code
from testbed.reports.reproduce import Finding
from testbed.reports.runner import REPORT_YAML, run_reports
from testbed.results import options as run_options
from testbed.results import record
from testbed.results.options import RunOptions
from testbed.results.record import RunRecord
from testbed.topology.model import Topology, from_data, to_data, with_overrides
from testbed.topology.placement import attempt
from testbed.topology.problem import Problem
from testbed.topology.validation import explain

ARGV_DIFF = "commands.diff"

Install = Callable[[Topology, str | None], prepare.Installation]


@dataclass(frozen=True)
class Wanted:
    """What the command line says over the bundle.

    ``settings``  of ``-s``, for a report's ``vars:``.
    """

    settings: Mapping[str, str]
    overrides: Overrides
    trust: bool = False
    expect: Word | None = None


@dataclass(frozen=True)
class Told:
    """What a bundle holds, read: as much as can be known without starting anything.

    ``case`` of a report, else None.
    """

    bundle: Bundle
    record: RunRecord
    options: RunOptions
    topology: Topology
    case: Case | None = None

    @property
    def word(self) -> str:
        """How it ended there."""
        if self.case is not None and self.record.reports:
            return self.record.reports[0].word
        return ExitCode(self.record.exit_code).name


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


def tell(bundle: Bundle, wanted: Wanted) -> Told:
    """Read a bundle's parts, as a stranger's.

    :raises InputError: one is wrong, uses something of this host without trust, or cannot be
        replayed as it needs what no bundle has. :raises CapabilityMissing: likewise, of a suite.
    """
    name = bundle.name
    written = record.parse_record(_in(name, record.FILE_NAME), bundle.member(record.FILE_NAME))
    asked = run_options.read_options(
        _in(name, run_options.FILE_NAME), bundle.member(run_options.FILE_NAME)
    )
    data = _with_kernel(name, written, wanted.overrides.kernel)
    if bundle.manifest.kind == "report":
        case = _case(bundle, written, asked, data, wanted)
        return Told(bundle, written, asked, case.topology, case)
    if wanted.settings:
        raise InputError(f"{name}: a run's topology is as resolved", hint="-s is for reports")
    _check_suites(name, asked)
    topology = _topology(name, data, trust=wanted.trust)
    said = wanted.overrides
    return Told(
        bundle,
        written,
        asked,
        with_overrides(topology, iommu_mode=said.iommu_mode, engine=said.engine),
    )


def _in(name: str, member: str) -> str:
    return f"{name}/{member}"


def _with_kernel(name: str, written: RunRecord, kernel: str | None) -> Mapping[str, Any]:
    """The topology with the kernel that was asked for, which one in a file of its maker's needs."""
    data = json.loads(json.dumps(dict(written.topology)))
    nodes = data.get("nodes")
    for node in nodes.values() if isinstance(nodes, dict) else ():
        if not isinstance(node, dict):
            continue
        theirs = str(node.get("kernel", prepare.DEFAULT_KERNEL))
        if kernel is not None:
            node["kernel"] = kernel
        elif theirs.startswith("$"):
            known = written.versions.get("kernels")
            built = known.get(theirs, {}) if isinstance(known, Mapping) else {}
            release = str(built.get("release", "")) if isinstance(built, Mapping) else ""
            message = f"ran a kernel of its maker's own: {theirs} {release}".rstrip()
            raise InputError(
                diagnostics=[Diagnostic(name, 0, 0, message)],
                hint="--kernel-tree DIR or --kernel; `--kernel default` for the testbed's own",
            )
    found: Mapping[str, Any] = data
    return found


def _case(
    bundle: Bundle, written: RunRecord, asked: RunOptions, data: Mapping[str, Any], wanted: Wanted
) -> Case:
    if len(written.reports) != 1:
        message = f"has {len(written.reports)} reports in its record"
        raise InputError(diagnostics=[Diagnostic(bundle.name, 0, 0, message, "one")])
    settings = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in written.reports[0].variables.items()
    }
    content = bundle.member(REPORT_YAML)
    theirs = re.sub(r"[^A-Za-z0-9._-]", "-", Path(written.reports[0].file).name)[:100]
    name = _in(bundle.name, theirs or REPORT_YAML)
    # A report may name files beside it. A bundle has none, and this folder is empty.
    with tempfile.TemporaryDirectory(prefix="testbed-bundle-") as folder:

        def read(overrides: Overrides, resolved: Mapping[str, Any] | None) -> Case:
            return load.load_bytes(
                content,
                name,
                {**settings, **wanted.settings},
                folder=Path(folder),
                overrides=overrides,
                trust=wanted.trust,
                resolved=resolved,
            )

        said = wanted.overrides
        case = read(said, data)
        if wanted.settings and (
            not isinstance(case.report.topology, str)
            or load.is_shipped_topology(case.report.topology)
        ):
            # Other values may make another rack of it.
            before = Overrides(
                said.kernel or asked.kernel or None,
                said.iommu_mode or asked.iommu_mode or None,
                said.engine or asked.engine or None,
                said.qemu,
            )
            case = read(before, None)
    return case


def _check_suites(name: str, asked: RunOptions) -> None:
    from testbed.harness import runner  # noqa: PLC0415  pytest; only of runs

    for word in asked.suites:
        if word in runner.PAYLOAD_SUITES:
            raise CapabilityMissing(f"replaying '{word}': programs of its maker's are in no bundle")
        if word not in (*runner.SUITES, runner.ALL_SUITES):
            message = f"'{word}' is no suite of the testbed; code is in no bundle"
            raise InputError(
                diagnostics=[Diagnostic(name, 0, 0, message)],
                hint="ask its maker for the file, and `testbed run` it",
            )


def _topology(name: str, data: Mapping[str, Any], *, trust: bool) -> Topology:
    from testbed.machine import own_devices  # noqa: PLC0415  seldom needed

    try:
        topology = from_data(data)
    except ValidationError as error:
        raise _wrong_topology(name, explain(error, Topology)) from None
    if found := attempt(topology).problems:
        raise _wrong_topology(name, found)
    topology, found = own_devices.admission(trust=trust)(topology)
    if not trust and not found:
        found = tuple(strangers.uses(topology, (), ("nodes",)))
    if found:
        raise _wrong_topology(name, found)
    return topology


def _wrong_topology(name: str, found: Any) -> InputError:
    problems: list[Problem] = list(found)
    return InputError(
        diagnostics=[
            Diagnostic(
                f"{_in(name, record.FILE_NAME)}: topology {'.'.join(map(str, each.path))}".rstrip(),
                0,
                0,
                each.message,
                each.expected,
                each.nearest,
            )
            for each in problems
        ]
    )


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
        deploy.versions_of(installation, accelerator),
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
    )
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
        if name.rpartition("/")[2] != deploy.COMMANDS_JSON:
            continue
        try:
            ours = json.loads(scrub((run_dir / name).read_bytes()))
            theirs = json.loads(content)
        except (OSError, ValueError, RecursionError):
            continue
        found += [f"{name}: {line}" for line in compare.command_lines(theirs, ours)]
    (run_dir / ARGV_DIFF).write_text("".join(f"{line}\n" for line in found))
    return tuple(found)
