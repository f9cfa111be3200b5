# SPDX-License-Identifier: Apache-2.0
"""The cells of a matrix: which there are, what each runs, and which cannot run, with the reason."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from testbed import __version__
from testbed.matrix.model import AXES, DEFAULT_QEMU, EMPTY_SUITE, Matrix, put_iommu, slug
from testbed.matrix.needs import Need, need_of
from testbed.topology.model import Topology, from_data, to_data, with_overrides
from testbed.topology.placement import attempt
from testbed.topology.validation import explain

Values = Mapping[str, str]  # by axis; "" is as the topology says


@dataclass(frozen=True)
class Suite:
    """A suite as the file names it, and where it is if it is a file.

    ``path``  of a test file or report, without the test that ``::`` may name.
    """

    word: str
    path: Path | None = None

    @property
    def argument(self) -> str:
        """The word for `testbed run`."""
        if self.path is None:
            return self.word
        _, colons, test = self.word.partition("::")
        return f"{self.path}{colons}{test}"


@dataclass(frozen=True)
class Cell:
    """One run.

    ``name``      unique in the matrix, fit for a folder.
    ``key``       of all that decides its result; a finished cell with the same key runs no more.
    ``values``    what it has of each axis.
    ``skip``      why it cannot run, or "".
    ``topology``  resolved, as plain data; empty if it cannot be.
    """

    name: str
    key: str
    values: Values
    suite: Suite
    need: Need = field(default_factory=Need)
    skip: str = ""
    topology: Mapping[str, Any] = field(default_factory=dict, repr=False)
    qemu: str = ""
    keyword: str = ""
    deadline_s: int = 1800
    warm: bool = False

    @property
    def is_empty(self) -> bool:
        """It starts nothing."""
        return self.suite.word == EMPTY_SUITE


@dataclass(frozen=True)
class Parts:
    """What the words of a matrix mean: topologies and suites, by the words; loaded once."""

    topologies: Mapping[str, Topology]
    suites: Mapping[str, Suite]


def expand(matrix: Matrix, parts: Parts) -> tuple[Cell, ...]:
    """All cells, in the order of :data:`AXES`, included ones last. Pure but for files' dates."""
    combinations = [dict(zip(AXES, row, strict=True)) for row in _rows(matrix)]
    kept = [(values, reason) for values in combinations for reason in _kept(matrix, values)]
    for more in matrix.include:
        suites = (more.suite,) if more.suite else matrix.suites
        for suite in suites:
            values = {axis: getattr(more, axis) or "" for axis in AXES} | {"suite": suite}
            if all(values != known for known, _ in kept):
                kept.append((values, ""))
    made = _Maker(matrix, parts)
    numbered = itertools.product(kept, range(matrix.repeat))
    width = len(str(len(kept) * matrix.repeat))
    return tuple(
        made.cell(values, reason, number, f"{at:0{width}}")
        for at, ((values, reason), number) in enumerate(numbered, 1)
    )


def _rows(matrix: Matrix) -> Iterator[tuple[str, ...]]:
    if not matrix.topologies:
        return iter(())
    return itertools.product(*(dict.fromkeys(matrix.values(axis)) for axis in AXES))


def _kept(matrix: Matrix, values: Values) -> Iterator[str]:
    """Nothing if the cell is left out, else why it is SKIP, or ""."""
    reason = ""
    for rule in matrix.exclude:
        if all(fnmatch.fnmatchcase(values[axis], p) for axis, p in rule.patterns.items()):
            if rule.reason is None:
                return
            reason = reason or rule.reason
    yield reason


@dataclass
class _Maker:
    """Makes cells, and each rack once."""

    matrix: Matrix
    parts: Parts
    _racks: dict[tuple[str, ...], tuple[dict[str, Any], Need, str]] = field(default_factory=dict)

    def cell(self, values: Values, skip: str, number: int, prefix: str) -> Cell:
        """The cell with these values."""
        matrix = self.matrix
        suite = self.parts.suites[values["suite"]]
        data, need, why_not = self._rack(values)
        qemu = values["qemu"] if values["qemu"] != DEFAULT_QEMU else ""
        words = [slug(value) for axis in AXES if (value := values[axis])]
        kernels = [node["kernel"] for node in data["nodes"].values()]
        identity: list[Any] = [dict(values), data, suite.argument, qemu, number, __version__]
        identity += [matrix.keyword, matrix.needs_kvm, matrix.warm]
        identity += [_stamp(path) for path in (suite.path, qemu, *kernels) if path]
        return Cell(
            name="-".join([prefix, *words])[:120],
            key=_digest(identity),
            values={**values},
            suite=suite,
            need=Need() if suite.word == EMPTY_SUITE else need,
            skip=skip or why_not,
            topology=data,
            qemu=qemu,
            keyword=matrix.keyword,
            deadline_s=matrix.deadline_s,
            warm=matrix.warm,
        )

    def _rack(self, values: Values) -> tuple[dict[str, Any], Need, str]:
        key = tuple(values[axis] for axis in ("topology", "kernel", "cpu", "iommu", "engine"))
        if key not in self._racks:
            self._racks[key] = self._made_rack(values)
        return self._racks[key]

    def _made_rack(self, values: Values) -> tuple[dict[str, Any], Need, str]:
        data = to_data(self.parts.topologies[values["topology"]])
        for node in data["nodes"].values():
            if values["kernel"]:
                node["kernel"] = values["kernel"]
            if values["cpu"]:
                node["machine"]["cpu"] = values["cpu"]
            if values["iommu"]:
                node["iommu"] = put_iommu(values["iommu"], node["iommu"])
        try:
            topology = with_overrides(from_data(data), engine=values["engine"] or None)
            problems = attempt(topology).problems
        except ValidationError as error:
            problems = explain(error, Topology)
        if problems:
            reason = "; ".join(
                f"{p.message} (needed: {p.expected})" if p.expected else p.message for p in problems
            )
            return data, Need(), f"no such rack: {reason}"
        need = need_of(topology, kvm=self.matrix.needs_kvm)
        return to_data(topology), need, ""


def _stamp(path: str | Path) -> tuple[int, int] | None:
    """What changes when the file does (a kernel that was built again), if there is one."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
