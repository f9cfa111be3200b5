# SPDX-License-Identifier: Apache-2.0
"""The record of a run: one versioned JSON file that says what ran, on what, and how it ended.

The classes are the format: the JSON Schema is generated from them (:func:`json_schema`), and a
record is read back into the same values. ``testbed.run/1`` only ever gains optional fields; a
change that an old reader would misunderstand becomes ``/2``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from testbed import __version__
from testbed.errors import Diagnostic, ExitCode, InputError
from testbed.results.report_record import ReportRecord
from testbed.results.verdicts import Outcome, RequirementResult, by_requirement, exit_code

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA = "testbed.run/1"
FILE_NAME = "record.json"
SUITE = "suite"  # who wanted a fault: a shipped suite, to judge what it does


@dataclass(frozen=True)
class RuleRecord:
    """A fault rule: its words, who wanted it (``topology``, ``command``, ``test`` or, as a part of
    what it judges, ``suite``), and how many of the accesses that it saw it struck.
    """

    name: str
    by: str
    armed: bool
    seen: int
    struck: int


@dataclass(frozen=True)
class ActionRecord:
    """Something else that was done to a device on purpose: ``engine stuck``, by whom, and whether
    it was taken back before the end.
    """

    what: str
    by: str
    undone: bool = False


@dataclass(frozen=True)
class DeviceRecord:
    """One model device at the end of its rack.

    ``rack``      which of the run's racks: ``rack``, ``rack-scalable`` …
    ``counters``  by path, and ``events``, since the rack began; empty if they could not be asked.
    ``lost``      the exit status of its model if that has died (256 + signal), else None.
    """

    rack: str
    node: str
    device: str
    lost: int | None = None
    counters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    rules: tuple[RuleRecord, ...] = ()
    actions: tuple[ActionRecord, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """One run.

    ``versions``   what was used: ``qemu``, ``kernel``, ``image`` … with their hashes.
    ``host``       the machine it ran on: system, processor, memory, accelerator.
    ``topology``   the rack as resolved (no templates left), as plain data; {} if there are several.
    ``topologies`` of a run in parts (``-j``, several ``-t``): each part's, by its label.
    ``command``    the words that started it, to be typed again.
    ``mutation``   the deliberate break in force, or "" (see :mod:`testbed.instruments.mutations`).
    ``policy``     how p2p-negotiation chose interconnects, or "" for its default.
    ``devices``    every model device of every rack: what it moved by which path, what was injected.
    ``reports``    the bug reports that happened again, or did not.
    ``started``    UTC, ISO 8601.
    ``exit_code``  what the process answered.
    """

    command: tuple[str, ...]
    started: str
    duration_s: float
    versions: Mapping[str, Any]
    host: Mapping[str, Any]
    topology: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    requirements: tuple[RequirementResult, ...]
    exit_code: int
    mutation: str = ""
    devices: tuple[DeviceRecord, ...] = ()
    reports: tuple[ReportRecord, ...] = ()
    policy: str = ""
    topologies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tool_version: str = __version__
    schema: str = SCHEMA
    __pydantic_config__: ClassVar = {"extra": "forbid"}


@dataclass
class RunInfo:
    """What is known of a run before and beside its outcomes; the run fills it in as it learns."""

    command: tuple[str, ...] = ()
    started: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)
    topology: Mapping[str, Any] = field(default_factory=dict)
    mutation: str = ""
    policy: str = ""
    devices: tuple[DeviceRecord, ...] = ()
    reports: tuple[ReportRecord, ...] = ()
    topologies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def injected(record: RunRecord) -> tuple[str, ...]:
    """What went wrong on purpose in the racks of the run, one line each; or by itself, if a
    device's model died. A suite's own faults are part of what it judges, and are not named.
    """
    lines: list[str] = []
    for device in record.devices:
        name = f"{device.node}/{device.device}"
        lines += [
            f"{name}: {rule.name}, struck {rule.struck}"
            for rule in device.rules
            if rule.by != SUITE and (rule.armed or rule.struck)
        ]
        lines += [f"{name}: {action.what}" for action in device.actions if action.by != SUITE]
        if device.lost is not None:
            lines.append(f"{name}: its model died")
    return tuple(lines)


def make_record(
    info: RunInfo, outcomes: tuple[Outcome, ...], *, duration_s: float, code: ExitCode | None = None
) -> RunRecord:
    """The record of these outcomes; ``code`` where the run ended otherwise than they say."""
    return RunRecord(
        command=info.command,
        started=info.started,
        duration_s=round(duration_s, 3),
        versions=info.versions,
        host=info.host,
        topology=info.topology,
        mutation=info.mutation,
        policy=info.policy,
        devices=info.devices,
        reports=info.reports,
        topologies=info.topologies,
        outcomes=outcomes,
        requirements=by_requirement(outcomes),
        exit_code=int(exit_code(outcomes) if code is None else code),
    )


def write_record(record: RunRecord, path: Path) -> None:
    """Write it as JSON, whole or not at all.

    Raises:
        OSError: the folder is missing, or the disk full; nothing is left behind then.
    """
    write_atomically(path, _as_json(record) + b"\n")


def _as_json(record: RunRecord) -> bytes:
    # As the adapter writes it, byte for byte, but that takes 50 ms to make and 20 to import.
    # Half a character, as a guest can say it, has no form in UTF-8, and the run has to end with a
    # record all the same.
    return json.dumps(record, indent=2, ensure_ascii=False, default=_plain).encode(errors="replace")


def _plain(value: Any) -> Any:
    """What JSON has no form for: the values of a record (their fields, in order), and mappings."""
    return dict(value) if isinstance(value, Mapping) else vars(value)


def load_record(path: Path) -> RunRecord:
    """Read a record back.

    Raises:
        InputError: it cannot be read, is no JSON, of another version, or not of the format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise InputError(diagnostics=[Diagnostic(str(path), 0, 0, message)]) from error
    return parse_record(str(path), content)


def parse_record(name: str, content: bytes) -> RunRecord:
    """The record in the bytes of a file called ``name``.

    Raises:
        InputError: it is no JSON, of another version, or not of the format.
    """

    from pydantic import ValidationError  # noqa: PLC0415  slow, and a run only writes its record

    def refuse(message: str, hint: str = "") -> InputError:
        return InputError(diagnostics=[Diagnostic(name, 0, 0, message)], hint=hint)

    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise refuse(f"is no JSON: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise refuse(
            f"is not a record of this version: schema {schema!r}, expected {SCHEMA!r}",
            "read it with the version of testbed that wrote it (field tool_version)",
        )
    try:
        # As JSON, because only there do enumerations and tuples have their plain forms.
        return _adapter().validate_json(json.dumps(data))
    except ValidationError as error:
        raise InputError(
            diagnostics=[
                Diagnostic(name, 0, 0, f"{'.'.join(map(str, e['loc']))}: {e['msg']}")
                for e in error.errors()
            ]
        ) from error


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the record, generated from the classes."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_adapter().json_schema(mode="serialization"),
        "title": SCHEMA,
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` so that a reader sees the old file or the new one, never half of one.

    Raises:
        OSError: it could not be written; the old file, if any, is as it was.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@cache
def _adapter() -> TypeAdapter[RunRecord]:
    from pydantic import TypeAdapter  # noqa: PLC0415  slow

    return TypeAdapter(RunRecord)
