# SPDX-License-Identifier: Apache-2.0
"""Reports one after the other, and what each leaves: a folder with its products and a record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from testbed.errors import ExitCode, HostError
from testbed.host.facts import host_facts
from testbed.host.places import write_places
from testbed.instruments.interface import RackSource
from testbed.reports.judge import Word
from testbed.reports.load import Case
from testbed.reports.outcome import exit_code, outcome_of, record_of
from testbed.reports.reproduce import Finding, reproduce
from testbed.results import junit, record
from testbed.results.options import RunOptions, write_options
from testbed.topology.model import to_data

REPORT_YAML = "report.yaml"  # the report as it was given
REPORT_JSON = "report.json"  # as it was read: variables and template resolved

Sources = Callable[[Case, Path], RackSource]


def run_reports(
    cases: Sequence[Case],
    run_dir: Path,
    sources: Sources,
    *,
    expect: Word | None = None,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    found: Callable[[Case, Finding], None] = lambda *_: None,
) -> tuple[list[Finding], ExitCode]:
    """Reproduce each; ``sources`` says where its rack comes from.

    :param run_dir: an existing folder. One report's products are in it; each of several has a
        folder there.
    :param found: is told each finding as soon as it is there.
    """
    findings = []
    for folder, case in zip(_folders(cases, run_dir), cases, strict=True):
        started = datetime.now(UTC).isoformat(timespec="seconds")
        began_s = time.monotonic()
        _keep(case, folder)
        finding = reproduce(case, sources(case, folder), say=say)
        findings.append(finding)
        info = record.RunInfo(
            command=tuple(command),
            started=started,
            versions=finding.versions,
            host=host_facts(),
            topology=to_data(case.topology),
            devices=finding.devices,
            reports=(record_of(case, finding, expect),),
        )
        written = record.make_record(
            info,
            (outcome_of(case, finding, expect),),
            duration_s=time.monotonic() - began_s,
            code=exit_code([finding.word], expect),
        )
        record.write_record(written, folder / record.FILE_NAME)
        junit.write_junit(written, folder / junit.FILE_NAME)
        found(case, finding)
    return findings, exit_code((finding.word for finding in findings), expect)


def _folders(cases: Sequence[Case], run_dir: Path) -> list[Path]:
    """A folder of its own for each of several; names twice get a number."""
    if len(cases) == 1:
        return [run_dir]
    names: list[str] = []
    for case in cases:
        same = sum(name.rpartition("~")[0] == case.name or name == case.name for name in names)
        names.append(f"{case.name}~{same + 1}" if same else case.name)
    return [run_dir / name for name in names]


def _keep(case: Case, folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        write_options(options_of(case), folder)
        write_places(folder)
        (folder / REPORT_YAML).write_bytes(case.content)
        text = json.dumps(resolved(case), indent=1, default=str)
        (folder / REPORT_JSON).write_text(text + "\n")
    except OSError as error:
        raise HostError(f"cannot write into {folder}: {error.strerror}") from error


def options_of(case: Case) -> RunOptions:
    """What the command line said over the report."""
    said = case.overrides
    return RunOptions(
        "repro",
        engine=said.engine or "",
        kernel=said.kernel or "",
        iommu_mode=said.iommu_mode or "",
    )


def resolved(case: Case) -> Mapping[str, Any]:
    """The report as it was read, with its topology as resolved: plain data."""
    data = case.report.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return {**data, "vars": dict(case.variables), "topology": to_data(case.topology)}
