# SPDX-License-Identifier: Apache-2.0
"""A run folder as values: its records, its racks, and where their logs are.

``testbed run`` leaves a record and a folder for each rack, with several engines one level further
down; ``testbed repro`` of several reports leaves a folder with a record for each. All of them
become one :class:`Run`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from testbed.errors import InputError
from testbed.page import files
from testbed.results import record as records
from testbed.results.record import DeviceRecord, RunRecord
from testbed.results.verdicts import Outcome, by_requirement
from testbed.topology.model import Topology, from_data
from testbed.topology.placement import place
from testbed.topology.plan import RackPlan

MOST_RECORD_BYTES = 64 << 20
MOST_PLAN_BYTES = 1 << 20
MOST_FUNCTIONS = 1500  # of a rack that is drawn; a node has room for some hundreds
MOST_RACKS = 64

_TOPOLOGY_FILE = "topology.json"
_VERSIONS_FILE = "versions.json"


@dataclass(frozen=True)
class RackFolder:
    """One rack of a run.

    ``name``   where it is in the run: ``rack``, ``rack-scalable``, ``igb/rack``.
    ``plan``   its placement; None if there is none, and ``problem`` then says why.
    ``nodes``  its machines' folders, by name.
    """

    name: str
    folder: Path
    plan: RackPlan | None
    problem: str
    nodes: Mapping[str, Path]

    @property
    def label(self) -> str:
        """Its name within its part of the run, as the record's devices have it."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Run:
    """All of a run folder.

    ``parts``  how many records it was made of.
    """

    folder: Path
    record: RunRecord
    racks: tuple[RackFolder, ...]
    parts: int = 1


def load_run(folder: Path) -> Run:
    """Read a run folder.

    :raises InputError: it is no run folder, or its record is too large or wrong.
    """
    if not folder.is_dir():
        raise files.refuse(folder, "there is no such folder", "a run folder, as `testbed run` says")
    own = folder / records.FILE_NAME
    if files.is_file(own):
        return Run(folder, _record(own), tuple(_racks(folder)))
    inside = [sub for sub in files.folders(folder) if files.is_file(sub / records.FILE_NAME)]
    if not inside:
        raise files.refuse(
            folder,
            f"is no run folder: no {records.FILE_NAME} is in it",
            "a folder that `testbed run` or `testbed repro` made, after it ended",
        )
    found = {sub.name: _record(sub / records.FILE_NAME) for sub in inside[:MOST_RACKS]}
    racks = [
        replace(rack, name=f"{sub.name}/{rack.name}")
        for sub in inside[:MOST_RACKS]
        for rack in _racks(sub)
    ]
    return Run(folder, _joined(found), tuple(racks[:MOST_RACKS]), len(found))


def _record(path: Path) -> RunRecord:
    if path.lstat().st_size > MOST_RECORD_BYTES:
        raise files.refuse(path, f"is larger than {MOST_RECORD_BYTES >> 20} MiB")
    return records.load_record(path)


def _joined(found: Mapping[str, RunRecord]) -> RunRecord:
    """Several reports of one command as one record."""
    every = list(found.values())
    outcomes: list[Outcome] = [outcome for record in every for outcome in record.outcomes]
    devices: list[DeviceRecord] = [
        replace(device, rack=f"{name}/{device.rack}")
        for name, record in found.items()
        for device in record.devices
    ]
    return replace(
        every[0],
        started=min(record.started for record in every),
        duration_s=round(sum(record.duration_s for record in every), 3),
        outcomes=tuple(outcomes),
        requirements=by_requirement(outcomes),
        devices=tuple(devices),
        reports=tuple(report for record in every for report in record.reports),
        exit_code=worst_code([record.exit_code for record in every]),
    )


def worst_code(codes: Sequence[int]) -> int:
    """The exit code that says most: a failure, else what was lost, else anything but 0."""
    order = (1, 3, 128, 130, 2, 125, 0)
    return min(codes, key=lambda code: order.index(code) if code in order else -1)


def _racks(folder: Path) -> Iterator[RackFolder]:
    """Racks right in the folder, or one level down, each engine's in a folder of its own."""
    count = 0
    for sub in files.folders(folder):
        ones = [sub] if files.is_file(sub / _TOPOLOGY_FILE) else list(files.folders(sub))
        for one in ones:
            if files.is_file(one / _TOPOLOGY_FILE) and count < MOST_RACKS:
                count += 1
                yield _rack(one, str(one.relative_to(folder)))


def _rack(folder: Path, name: str) -> RackFolder:
    plan, problem = None, ""
    try:
        plan = placed(_json(folder / _TOPOLOGY_FILE))
        functions = sum(len(node.functions) for node in plan.nodes.values())
        if functions > MOST_FUNCTIONS:
            plan, problem = (
                None,
                f"it has {functions:,} PCI functions, more than {MOST_FUNCTIONS:,}",
            )
    except InputError as error:
        problem = str(error)
    nodes = {sub.name: sub for sub in files.folders(folder) if not sub.name.startswith(".")}
    return RackFolder(name, folder, plan, problem, nodes)


def placed(data: Any) -> RackPlan:
    """The placement of a topology as kept.

    :raises InputError: it is none, or does not fit into this version's machines.
    """
    if not isinstance(data, dict):
        raise InputError("the topology as kept cannot be read")
    try:
        topology: Topology = from_data(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"the topology as kept is none: {where}: {first['msg']}") from None
    return place(topology)


def versions_of(rack: RackFolder) -> Mapping[str, Any]:
    """What the rack was made with, as it was kept beside it; empty if it was not."""
    found = _json(rack.folder / _VERSIONS_FILE)
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> Any:
    part = files.read(path, MOST_PLAN_BYTES)
    if part is None or part.cut_bytes:
        return None
    try:
        return json.loads(part.head)
    except (ValueError, RecursionError):
        return None
