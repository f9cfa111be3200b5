# SPDX-License-Identifier: Apache-2.0
"""Running suites in this process: pytest inside, our results outside.

KTAP goes to the given stream as tests end; pytest's own output goes to ``pytest.log`` in the run
folder, beside ``record.json`` and ``junit.xml``. The user's pytest settings and plugins play no
part, so that a suite does the same everywhere.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pytest
from rich.console import Console

from testbed.errors import CapabilityMissing, ExitCode, InputError
from testbed.harness import pytest_plugin
from testbed.harness.engines import agreement, labelled
from testbed.harness.session import ConformanceSession
from testbed.harness.shipped import DEFAULT_SUITE, SUITES_DIR, suite_paths
from testbed.host.facts import host_facts
from testbed.host.places import write_places
from testbed.instruments.interface import RackSource
from testbed.instruments.mutations import Mutation, parse_mutation
from testbed.instruments.negotiation_rules import parse_policy
from testbed.results import junit, record
from testbed.results.ktap import KtapStream
from testbed.results.options import ALL_ENGINES, RunOptions, write_options
from testbed.results.table import print_table
from testbed.results.verdicts import Outcome, Verdict
from testbed.topology.model import to_data

if TYPE_CHECKING:
    from testbed.harness.report_items import ReportOptions
    from testbed.payload.collection import Payload
    from testbed.payload.multiboot import MachinePrograms

PYTEST_LOG = "pytest.log"
_PYTEST_INI = "pytest.ini"
_TEST_TIMEOUT_S = 300

_ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and its record."""

    code: ExitCode
    record: record.RunRecord


@dataclass(frozen=True)
class Choice:
    """What of the suites is run, and how.

    ``suites``    names (``p2p-iommu``, or ``all``), or test files of the user's own
        (``path[::test]``); none means the first suite.
    ``keyword``   as pytest's ``-k``; the gates of what it chooses run too.
    ``reports``   what the command line says over bug reports among the suites.
    ``policy``    of the suite ``p2p-negotiation``; "" is its default.
    ``pristine``  a fresh machine for each test.
    ``payload``   what the suite ``kselftest`` or ``kvm-unit-tests`` runs.
    """

    suites: Sequence[str] = ()
    keyword: str = ""
    mutation: Mutation = Mutation.NONE
    reports: ReportOptions | None = None
    policy: str = field(default="", kw_only=True)
    pristine: bool = field(default=False, kw_only=True)
    payload: Payload | MachinePrograms | None = None


def run_engines(
    choice: Choice,
    sources: Mapping[str, RackSource | CapabilityMissing],
    run_dir: Path,
    *,
    stream: TextIO | None = None,
    console: Console | None = None,
    command: Sequence[str] = (),
) -> RunResult:
    """Run suites on one rack with one engine after the other, and compare what they say.

    :param sources: by engine, or why there is none: a SKIP. What each leaves is in a folder of its
        own below ``run_dir``, the record and JUnit file of all in ``run_dir``. KTAP is nested: one
        subtest an engine.

    Raises:
        InputError: as :func:`run_suites`.
    """
    out = stream or sys.stdout
    ktap = KtapStream(out)
    _keep_options(choice, run_dir, engine=ALL_ENGINES)
    writer = _Writer(run_dir, command or sys.argv)
    ktap.plan(len(sources) + 1)
    found: dict[str, list[Outcome]] = {}
    devices: list[record.DeviceRecord] = []
    session = None
    for engine, source in sources.items():
        if isinstance(source, CapabilityMissing):
            found[engine] = [Outcome((), "rack", Verdict.SKIP, str(source))]
            ktap.outcome(*labelled(engine, found[engine]))
            continue
        folder = run_dir / engine
        folder.mkdir(mode=0o700, exist_ok=True)
        session = _run_session(choice, source, folder, ktap.subtest(engine))
        found[engine] = session.outcomes
        devices += [replace(each, rack=f"{engine}/{each.rack}") for each in session.devices]
        ktap.subtest_ended(engine, session.outcomes)
        if session.interrupted:
            break
    if session is None:
        raise InputError("no engine can be placed in this topology")
    outcomes = [o for engine, some in found.items() for o in labelled(engine, some)]
    if len(found) == len(sources):
        outcomes.append(agreement(found))
        ktap.outcome(outcomes[-1])
    session.outcomes[:] = outcomes
    session.devices[:] = devices
    return _conclude(writer, session, ktap, run_dir, console)


def run_suites(
    choice: Choice,
    source: RackSource,
    run_dir: Path,
    *,
    stream: TextIO | None = None,
    console: Console | None = None,
    command: Sequence[str] = (),
) -> RunResult:
    """Run suites on one rack, write what they found, and say how it ended.

    :param run_dir: an existing folder for everything that is kept.
    :param stream: for KTAP; standard output if None.
    :param console: for the table; standard error if None.

    Raises:
        InputError: no such suite or file, or no test is left to run.
    """
    ktap = KtapStream(stream or sys.stdout)
    _keep_options(choice, run_dir)
    writer = _Writer(run_dir, command or sys.argv)
    session = _run_session(choice, source, run_dir, ktap)
    return _conclude(writer, session, ktap, run_dir, console)


def _keep_options(choice: Choice, run_dir: Path, *, engine: str = "") -> None:
    """What was asked, and where: what it takes to make a bundle of the run."""
    options = RunOptions(
        "run",
        tuple(choice.suites),
        choice.keyword,
        str(choice.mutation),
        engine,
        policy=choice.policy,
        pristine=choice.pristine,
    )
    write_options(options, run_dir)
    write_places(run_dir)


def _conclude(
    writer: _Writer,
    session: ConformanceSession,
    ktap: KtapStream,
    run_dir: Path,
    console: Console | None,
) -> RunResult:
    ktap.end("interrupted" if session.interrupted else "")
    written = writer.write(session)
    print_table(written, run_dir, console or Console(stderr=True))
    return RunResult(ExitCode(written.exit_code), written)


def _run_session(
    choice: Choice, source: RackSource, run_dir: Path, ktap: KtapStream
) -> ConformanceSession:
    paths = [path for word in choice.suites or (DEFAULT_SUITE,) for path in suite_paths(word)]
    session = ConformanceSession(
        source,
        mutation=choice.mutation,
        policy=choice.policy,
        on_plan=ktap.plan,
        on_outcome=ktap.outcome,
        on_parts=ktap.parts,
        payload=choice.payload,
        pristine=choice.pristine,
        report_options=choice.reports,
    )
    ini = run_dir / _PYTEST_INI
    ini.write_text(f"[pytest]\ntimeout = {_TEST_TIMEOUT_S}\n")
    arguments = [
        f"--config-file={ini}",
        "--capture=sys",  # KTAP goes to descriptor 1 while a test runs
        *("-p", "no:cacheprovider"),
        # It collects garbage five times at the end, 0.2 s of processor time, to warn in our log.
        *("-p", "no:unraisableexception"),
        # Up to there folders are looked through, each file of which pytest thinks about.
        *([f"--confcutdir={SUITES_DIR}"] if all(map(_is_ours, paths)) else []),
        *("-k", choice.keyword),
        "-rA",
        *paths,
    ]
    # As a module: for a name pytest reads what every installed package has to offer.
    timeouts = importlib.import_module("pytest_timeout")
    with (
        (run_dir / PYTEST_LOG).open("w") as log,
        _environment(_ENVIRONMENT),
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = pytest.main(arguments, plugins=[timeouts, pytest_plugin, session])
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise InputError(
            f"no test to run: {' '.join(choice.suites) or DEFAULT_SUITE}"
            + (f" with -k '{choice.keyword}'" if choice.keyword else ""),
            hint=f"pytest's own words are in {run_dir / PYTEST_LOG}",
        )
    if code == pytest.ExitCode.INTERNAL_ERROR:
        reason = f"pytest's internal error, see {run_dir / PYTEST_LOG}"
        session.outcomes.append(Outcome((), "pytest", Verdict.ERROR, reason))
    return session


def session_from_options(
    *,
    topology: str | None,
    settings: Sequence[str],
    rack: str | None,
    run_dir: Path | None,
    mutation: str,
    policy: str = "",
    trust: bool = False,
) -> ConformanceSession:
    """The session of someone's own ``pytest --testbed-…``.

    Raises:
        InputError: the topology is wrong or not trusted, no such rack runs, or both or no mutation
            was meant.
    """
    # The commands that boot are slow to import, and `testbed run` brings a source of its own.
    from testbed.chosen_topology import load_topology  # noqa: PLC0415
    from testbed.deploy import StartOptions  # noqa: PLC0415
    from testbed.harness.sources import RunningSource, TopologySource  # noqa: PLC0415

    if topology and rack:
        raise InputError("--testbed-topology boots a rack, --testbed-rack uses one: choose")
    chosen, rule = parse_mutation(mutation), parse_policy(policy)
    if run_dir is None:
        run_dir = Path(tempfile.mkdtemp(prefix="testbed-run-"))
    run_dir.mkdir(parents=True, exist_ok=True)
    options = StartOptions(trust=trust)
    source: RackSource = (
        RunningSource(rack, run_dir, options=options)
        if rack
        else TopologySource(
            load_topology(topology or "", settings, trust=trust), run_dir, options=options
        )
    )
    writer = _Writer(run_dir, sys.argv)
    return ConformanceSession(source, mutation=chosen, policy=rule, on_end=writer.write)


def _is_ours(path: str) -> bool:
    return Path(path).parent == SUITES_DIR


class _Writer:
    """Writes a session's record and JUnit file."""

    def __init__(self, run_dir: Path, command: Sequence[str]) -> None:
        self._run_dir = run_dir
        self._command = tuple(command)
        self._started = datetime.now(UTC)
        self._clock_s = time.monotonic()

    def write(self, session: ConformanceSession) -> record.RunRecord:
        info = record.RunInfo(
            command=self._command,
            started=self._started.isoformat(timespec="seconds"),
            versions=session.pool.main.last_versions,
            host=host_facts(),
            topology=to_data(session.pool.source.topology),
            mutation=session.mutation,
            policy=session.policy,
            devices=tuple(session.devices),
            reports=tuple(session.reports),
        )
        written = record.make_record(
            info,
            tuple(session.outcomes),
            duration_s=time.monotonic() - self._clock_s,
            code=ExitCode.INTERRUPTED if session.interrupted else None,
        )
        record.write_record(written, self._run_dir / record.FILE_NAME)
        junit.write_junit(written, self._run_dir / junit.FILE_NAME)
        return written


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
