# SPDX-License-Identifier: Apache-2.0
"""A run as it is remembered: one line about it, and one for each requirement. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from testbed.results.record import RunRecord

MOST_REASON = 400  # characters


@dataclass(frozen=True)
class RunLine:
    """One run.

    ``key``       the same run has the same, wherever it is read from.
    ``topology``  the rack's name; ``kernel`` its kernels' releases; ``iommu`` kinds and modes.
    ``setting``   a hash of all that decides beside the kernel and QEMU: the topology as resolved,
                  and a report's variables. Two runs of one setting and one kernel must agree.
    ``mutation``  what was broken on purpose, or "".
    """

    key: str
    started: str
    folder: str
    command: str
    topology: str
    kernel: str
    build_id: str
    iommu: str
    qemu: str
    accelerator: str
    setting: str
    mutation: str
    tool_version: str
    exit_code: int
    duration_s: float


@dataclass(frozen=True)
class ResultLine:
    """What one run said of one requirement, test without one, or report (then its word)."""

    name: str
    verdict: str
    reason: str
    tests: int
    duration_s: float


@dataclass(frozen=True)
class Remembered:
    """A result with the run that said it."""

    run: RunLine
    result: ResultLine


def run_line(record: RunRecord, folder: str) -> RunLine:
    """The line of a run whose record is in ``folder``."""
    versions = record.versions
    kernels = versions.get("kernels")
    facts = (
        [each for each in kernels.values() if isinstance(each, Mapping)]
        if isinstance(kernels, Mapping)
        else []
    )
    key = _digest([record.started, record.command, record.duration_s, folder])
    return RunLine(
        key=key,
        started=record.started,
        folder=folder,
        command=" ".join(record.command),
        topology=str(record.topology.get("rack", "")),
        kernel=_joined(str(each.get("release", "")) for each in facts),
        build_id=_joined(str(each.get("build_id") or each.get("sha256", "")) for each in facts),
        iommu=_joined(_iommus(record.topology)),
        qemu=str(versions.get("qemu", "")),
        accelerator=str(versions.get("accelerator", "")),
        setting=_digest([record.topology, [dict(each.variables) for each in record.reports]]),
        mutation=record.mutation,
        tool_version=record.tool_version,
        exit_code=record.exit_code,
        duration_s=record.duration_s,
    )


def result_lines(record: RunRecord) -> Iterator[ResultLine]:
    """Requirements by identifier; tests without one by name, and reports by theirs."""
    times: dict[str, float] = {}
    for outcome in record.outcomes:
        for name in outcome.requirements or (outcome.test,):
            times[name] = round(times.get(name, 0.0) + outcome.duration_s, 3)
    for result in record.requirements:
        name, count = result.requirement, sum(result.tests.values())
        yield _line(name, result.verdict, result.reason, count, times.get(name, 0.0))
    words = {}
    if len(record.reports) == len(record.outcomes):
        words = {id(o): r for o, r in zip(record.outcomes, record.reports, strict=True)}
    seen: set[str] = set()
    for outcome in record.outcomes:
        if outcome.requirements or outcome.test in seen:
            continue
        seen.add(outcome.test)
        report = words.get(id(outcome))
        said = (report.word, report.reason) if report else (outcome.verdict, outcome.reason)
        yield _line(outcome.test, *said, 1, times[outcome.test])


def _line(name: str, verdict: str, reason: str, tests: int, duration_s: float) -> ResultLine:
    return ResultLine(name, str(verdict), reason[:MOST_REASON], tests, duration_s)


def _iommus(topology: Mapping[str, Any]) -> Iterator[str]:
    nodes = topology.get("nodes")
    for node in nodes.values() if isinstance(nodes, Mapping) else ():
        iommu = node.get("iommu") if isinstance(node, Mapping) else None
        if isinstance(iommu, Mapping):
            yield f"{iommu.get('kind')} {iommu.get('mode')}"


def _joined(words: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(word for word in words if word))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
