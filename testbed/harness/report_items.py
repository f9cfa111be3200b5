# SPDX-License-Identifier: Apache-2.0
"""Reports as pytest's tests: PASS is FIXED, unless ``--testbed-expect reproduced``.

In a session of the testbed the rack comes from where the session's racks come from, and the
evidence goes into its record; else from here, into a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testbed.chosen_topology import parse_settings
from testbed.errors import CapabilityMissing, InputError, LostError, TestbedError
from testbed.harness.session import SESSION
from testbed.instruments.interface import RackSource
from testbed.instruments.observer import Refuted
from testbed.reports.judge import Word
from testbed.reports.load import Case, Overrides, load
from testbed.reports.outcome import record_of, verdict_of
from testbed.reports.printing import lines
from testbed.reports.reproduce import reproduce
from testbed.results.verdicts import Verdict


@dataclass(frozen=True)
class ReportOptions:
    """How reports are run in a pytest session."""

    settings: dict[str, str]
    overrides: Overrides
    trust: bool = False
    expect: Word = Word.FIXED

    @classmethod
    def of(cls, config: pytest.Config) -> ReportOptions:
        """The session's, or those of someone's own ``pytest --testbed-…``."""
        session = config.stash.get(SESSION, None)
        if session is not None and session.report_options is not None:
            return session.report_options
        option = config.option
        settings = [] if option.testbed_topology else option.testbed_set
        expect = Word(option.testbed_expect.upper())
        return cls(parse_settings(settings), Overrides(), option.testbed_trust, expect)


class ReportFile(pytest.File):
    """One file, one test."""

    def collect(self) -> Iterable[pytest.Item]:
        """The test; a report that is wrong is an error of collection, in its own words."""
        options = ReportOptions.of(self.config)
        try:
            case = load(
                self.path, options.settings, overrides=options.overrides, trust=options.trust
            )
        except InputError as error:
            raise self.CollectError(str(error)) from error
        yield ReportItem.from_parent(self, name=case.name, case=case, options=options)


class ReportItem(pytest.Item):
    """A report that happens again."""

    def __init__(self, *, case: Case, options: ReportOptions, **more: Any) -> None:
        super().__init__(**more)
        self.case = case
        self.options = options

    def runtest(self) -> None:
        """Boot, do, judge; raises what the session makes a verdict of."""
        session = self.config.stash.get(SESSION, None)
        source: RackSource
        if session is not None:
            source = session.pool.source
        else:
            source = _own_source(self.case, trust=self.options.trust)
        finding = reproduce(self.case, source, label=f"report-{self.case.name}")
        expect = self.options.expect
        if session is not None:
            session.observer(self).add(*finding.evidence)
            session.observer(self).conclude(f"{finding.word}: {finding.reason}")
            session.reports.append(record_of(self.case, finding, expect))
        self.add_report_section("call", "report", "\n".join(lines(self.case, finding)))
        match verdict_of(finding.word, expect):
            case Verdict.SKIP:
                raise CapabilityMissing(finding.reason) if session else _skip(finding.reason)
            case Verdict.LOST:
                raise LostError(
                    finding.reason, node=self.case.name, console_tail=finding.console_tail
                )
            case Verdict.ERROR:
                raise TestbedError(finding.reason)
            case Verdict.FAIL:
                raise Refuted(f"{finding.word}: {finding.reason}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """A report's failure is what was seen, not where this file raised it."""
        if isinstance(excinfo.value, Refuted | TestbedError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """For pytest's headings."""
        return self.path, None, self.case.report.title


def _skip(reason: str) -> BaseException:
    return pytest.skip.Exception(reason)


def _own_source(case: Case, *, trust: bool) -> RackSource:
    from testbed.deploy import StartOptions  # noqa: PLC0415  slow to import
    from testbed.harness.sources import TopologySource  # noqa: PLC0415

    run_dir = Path(tempfile.mkdtemp(prefix="testbed-run-"))
    return TopologySource(case.topology, run_dir, options=StartOptions(trust=trust))
