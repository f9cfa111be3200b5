# SPDX-License-Identifier: Apache-2.0
"""One report from a boot to its word: start the rack, do the steps, judge what they saw."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from testbed.errors import AgentError, CapabilityMissing, LostError, TestbedError
from testbed.instruments.device_records import records
from testbed.instruments.interface import Rack, RackSource
from testbed.reports.actions import Stage
from testbed.reports.judge import Held, Scene, Word, judge, matches, word_of
from testbed.reports.load import Case
from testbed.reports.references import resolve
from testbed.reports.seen import Seen
from testbed.reports.steps import Step
from testbed.results.error_details import details_of
from testbed.results.evidence import Evidence
from testbed.results.record import DeviceRecord

RACK = "rack"
_KEPT_CHARACTERS = 2000  # of each text that a step saw; conditions have all of it


@dataclass(frozen=True)
class StepDone:
    """One step, for the record: its words, what it saw, how long it took."""

    number: int
    words: str
    values: Mapping[str, Any]
    duration_s: float


@dataclass(frozen=True)
class Finding:
    """How a report ended.

    ``reason``        one line: what was seen, or why nothing can be said.
    ``held``          every condition of both expectations; empty if the steps did not come so far.
    ``console_tail``  of a machine that was lost.
    ``details``       for an ERROR.
    """

    word: Word
    reason: str
    held: tuple[Held, ...] = ()
    steps: tuple[StepDone, ...] = ()
    console_tail: str = ""
    details: str = ""
    boot_s: float = 0.0
    duration_s: float = 0.0
    versions: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[DeviceRecord, ...] = ()
    noted: tuple[Evidence, ...] = ()

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """What the word rests on: of the expectation that holds, else of both; each once."""
        side = {Word.REPRODUCED: "as_reported", Word.FIXED: "when_fixed"}.get(self.word)
        found = [
            item for each in self.held if side in (None, each.expectation) for item in each.evidence
        ]
        return tuple(dict.fromkeys([*self.noted, *found]))


class _Ended(Exception):
    """A step did not go as it must for the report to be judged."""


def reproduce(
    case: Case,
    source: RackSource,
    *,
    label: str = RACK,
    say: Callable[[str], None] = lambda _: None,
) -> Finding:
    """Boot the case's rack, do its steps and judge; the rack is ended whatever happens.

    :param label: the rack's, and the name of the folder for its logs.
    :param say: is told of each step.

    Nothing but an interrupt is raised: what goes wrong is the finding.
    """
    began_s = time.monotonic()
    run = _Run(case, label, say)
    try:
        finding = run.run(source)
    except CapabilityMissing as missing:
        finding = Finding(Word.SKIP, missing.message)
    except LostError as lost:
        finding = Finding(Word.LOST, lost.message, console_tail=lost.console_tail)
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        finding = Finding(
            Word.ERROR, f"{type(error).__name__}: {message}", details=details_of(error)
        )
    return run.complete(finding, time.monotonic() - began_s)


class _Run:
    def __init__(self, case: Case, label: str, say: Callable[[str], None]) -> None:
        self._case = case
        self._label = label
        self._say = say
        self._done: list[StepDone] = []
        self._noted: list[Evidence] = []
        self._boot_s = 0.0
        self._versions: Mapping[str, Any] = {}
        self._devices: tuple[DeviceRecord, ...] = ()

    def run(self, source: RackSource) -> Finding:
        began_s = time.monotonic()
        rack = source.start(self._case.topology, self._label)
        self._boot_s = time.monotonic() - began_s
        self._versions = rack.versions
        try:
            finding = self._on(rack)
            self._devices = tuple(self._records(rack))
            return finding
        finally:
            rack.close()

    def complete(self, finding: Finding, duration_s: float) -> Finding:
        return replace(
            finding,
            steps=tuple(self._done),
            boot_s=self._boot_s,
            duration_s=duration_s,
            versions=self._versions,
            devices=self._devices,
            noted=tuple(self._noted),
        )

    def _on(self, rack: Rack) -> Finding:
        report = self._case.report
        stage = Stage(rack, report)
        console = None
        try:
            for number, step in enumerate(report.steps, 1):
                self._step(stage, number, step)
        except _Ended as ended:
            return Finding(Word.DIFFERENT, str(ended))
        except LostError as lost:
            console = lost.console_tail
            held = judge(report, Scene(rack.plan, stage.seen, stage.scope, console))
            word, reason = word_of(held)
            if word is not Word.REPRODUCED:
                raise
            return Finding(word, reason, held, console_tail=console)
        held = judge(report, Scene(rack.plan, stage.seen, stage.scope))
        word, reason = word_of(held)
        return Finding(word, reason, held)

    def _records(self, rack: Rack) -> list[DeviceRecord]:
        with contextlib.suppress(TestbedError):
            return records(rack, self._label)
        return []

    def _step(self, stage: Stage, number: int, step: Step) -> None:
        words = words_of(step)
        self._say(f"step {number}: {words}")
        began_s = time.monotonic()
        try:
            seen = stage.perform(step)
        except LostError:
            raise
        except TestbedError as error:
            if not step.may_fail:
                if isinstance(error, CapabilityMissing):
                    raise
                raise _Ended(f"step {number} ({words}) failed: {_one_line(error)}") from error
            seen = Seen({"errno": _errno(error), "error": _one_line(error)})
        seen = replace(seen, values={"errno": "", "error": "", **seen.values})
        if step.name is not None:
            stage.seen[step.name] = seen
        values = {name: _kept(value) for name, value in seen.values.items()}
        self._done.append(StepDone(number, words, values, time.monotonic() - began_s))
        self._noted += seen.evidence
        for name, wanted in step.expect.items():
            value = resolve(wanted, stage.scope)
            if not matches(seen.values.get(name), value):
                found = seen.values.get(name)
                raise _Ended(f"step {number} ({words}): {name} is {found!r}, expected {value!r}")


def words_of(step: Step) -> str:
    """``copy importer``: the step as its author would call it."""
    data = step.model_dump(by_alias=True)
    value = data[step.kind]
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{step.kind} {text.splitlines()[0][:60] if text else ''}".rstrip()


def _kept(value: Any) -> Any:
    """For the record: a text of moderate length."""
    if isinstance(value, str) and len(value) > _KEPT_CHARACTERS:
        return value[:_KEPT_CHARACTERS] + "…"
    return value


def _one_line(error: TestbedError) -> str:
    return str(error).strip().partition("\n")[0]


def _errno(error: TestbedError) -> str:
    number = error.errno if isinstance(error, AgentError) else None
    return errno.errorcode.get(number, str(number)) if number is not None else ""
