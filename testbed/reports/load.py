# SPDX-License-Identifier: Apache-2.0
"""A report file to a Case: the report, and the topology that it happens in.

bytes → text → ``vars:`` and ``-s`` → template → YAML with places → report → topology, with the
environment put in → references. As with topologies each stage says all of its faults at once, at
their places in the user's file.

A report is a stranger's: without ``trust`` it names nothing on this host but what stands in its own
folder, no program, no real device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from testbed.errors import Diagnostic, InputError
from testbed.host import paths
from testbed.reports import strangers
from testbed.reports.checks import problems
from testbed.reports.model import SUFFIX, Environment, Report
from testbed.topology import load as topologies
from testbed.topology.document import Document, read_document
from testbed.topology.model import Topology, from_data, to_data, with_overrides
from testbed.topology.placement import attempt
from testbed.topology.plan import RackPlan
from testbed.topology.problem import DataPath, Problem, listing, nearest
from testbed.topology.validation import explain

WHOLE = "the report"


@dataclass(frozen=True)
class Overrides:
    """What the command line says over the report; None: nothing."""

    kernel: str | None = None
    iommu_mode: str | None = None
    engine: str | None = None
    qemu: str | None = None


@dataclass(frozen=True)
class Case:
    """A report ready to happen.

    ``file``      as the user named it.
    ``variables`` the values of its ``vars:``.
    ``qemu``      another QEMU than the tool root's, or None.
    ``content``   the file's bytes.
    ``overrides`` what the command line said over it.
    """

    file: str
    report: Report
    topology: Topology
    plan: RackPlan
    variables: Mapping[str, Any]
    qemu: str | None = None
    content: bytes = field(default=b"", repr=False)
    overrides: Overrides = field(default_factory=Overrides)

    @property
    def name(self) -> str:
        """For folders and tests: the file's name without its endings."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", Path(self.file).name.partition(".")[0]) or "report"


def load(
    path: Path,
    settings: Mapping[str, str],
    *,
    overrides: Overrides | None = None,
    trust: bool = False,
) -> Case:
    """The report in a file.

    :param settings: of ``-s``, for the report's ``vars:``.
    :param trust: it may name paths of this host, real devices, and devices of its own.
    :raises InputError: everything that is wrong with it.
    """
    return load_bytes(
        topologies.read(path),
        str(path),
        settings,
        folder=path.absolute().parent,
        overrides=overrides,
        trust=trust,
    )


def load_bytes(
    content: bytes,
    name: str,
    settings: Mapping[str, str],
    *,
    folder: Path,
    overrides: Overrides | None = None,
    trust: bool = False,
    resolved: Mapping[str, Any] | None = None,
) -> Case:
    """The report in the bytes of a file called ``name`` in ``folder``.

    :param resolved: its topology with the environment in it, as a record keeps it, instead of what
        the report names.
    """
    file = read_document(content, name, settings)
    try:
        report = Report.model_validate(file.data)
    except ValidationError as error:
        raise file.error(explain(error, Report, whole=WHOLE)) from None
    overrides = overrides or Overrides()
    topology = _Racks(file, report, folder, trust).topology(resolved)
    if (overrides.kernel, overrides.iommu_mode, overrides.engine) != (None, None, None):
        topology = with_overrides(
            topology,
            kernel=overrides.kernel,
            iommu_mode=overrides.iommu_mode,
            engine=overrides.engine,
        )
    placed = attempt(topology)
    if placed.plan is None:
        raise file.error([Problem(("topology",), p.message, p.expected) for p in placed.problems])
    found = problems(report, placed.plan, file.data)
    if found:
        raise file.error(found)
    qemu = overrides.qemu or report.environment.qemu
    return Case(name, report, topology, placed.plan, dict(file.values), qemu, content, overrides)


@dataclass(frozen=True)
class _Racks:
    """Where a report's topology comes from."""

    file: Document
    report: Report
    folder: Path
    trust: bool

    def topology(self, resolved: Mapping[str, Any] | None) -> Topology:
        """As the report wants it, its environment put in; InputError."""
        prefix: DataPath = ()
        if resolved is not None:
            return self._resolved(resolved)
        if isinstance(self.report.topology, Mapping):
            topology, prefix = self._inline(self.report.topology), ("topology",)
        else:
            topology = self._named(self.report.topology)
        topology = self._admitted(topology, prefix)
        if not self.trust and (found := list(self._strange(topology, prefix))):
            raise self.file.error(found)
        return self._in_environment(topology)

    def _resolved(self, data: Mapping[str, Any]) -> Topology:
        try:
            topology = from_data(data, folder=self.folder)
        except ValidationError as error:
            found: Iterable[Problem] = explain(error, Topology)
        else:
            found = attempt(topology).problems
        if not found:
            topology = self._admitted(topology, ())
            found = () if self.trust else tuple(strangers.uses(topology, (), ()))
        if found:
            raise self.file.error(Problem(("topology",), p.message, p.expected) for p in found)
        return topology

    def _inline(self, data: Mapping[str, Any]) -> Topology:
        if self.report.settings:
            message = "an inline topology has no settings of its own"
            expected = "the report's 'vars:' in its template"
            raise self.file.error([Problem(("set",), message, expected, at_key=True)])
        try:
            topology = from_data(data, folder=self.folder)
        except ValidationError as error:
            found = explain(error, Topology)
        else:
            found = attempt(topology).problems
        if found:
            raise self.file.error(_below(("topology",), each) for each in found)
        return topology

    def _named(self, word: str) -> Topology:
        path = self._find(word)
        settings = {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in self.report.settings.items()
        }
        try:
            return topologies.load(path, settings)
        except InputError as error:
            raise self._settings_error(error) from None

    def _find(self, word: str) -> Path:
        from testbed.chosen_topology import shipped_topologies  # noqa: PLC0415  seldom used

        shipped = shipped_topologies()
        if word in shipped:
            return shipped[word]
        path = (self.folder / word).resolve()
        if not self.trust and not path.is_relative_to(self.folder.resolve()):
            message = f"'{word}' is outside of the report's folder"
            raise self.file.error([Problem(("topology",), message, "--trust, or a file beside it")])
        if not path.is_file():
            beside = (p.name for p in self.folder.glob("*.y*ml"))
            known = f"{listing(shipped)}, or a file beside the report"
            near = nearest(word, [*shipped, *beside])
            message = f"there is no topology '{word}'"
            raise self.file.error([Problem(("topology",), message, known, near)])
        return path

    def _settings_error(self, error: InputError) -> InputError:
        """Faults of ``set:`` at their places in the report; others where they are."""
        found = []
        for each in error.diagnostics:
            match = re.match(r"-s ([^=]+)=", each.file)
            if match is None:
                return error
            found.append(Problem(("set", match[1]), each.message, each.expected, each.nearest))
        return self.file.error(found) if found else error

    def _admitted(self, topology: Topology, prefix: DataPath) -> Topology:
        """With what devices of the report's own need filled in, if they are trusted."""
        from testbed.machine import own_devices  # noqa: PLC0415  seldom needed

        admitted, found = own_devices.admission(trust=self.trust)(topology)
        if found:
            raise self.file.error(_below(("topology",) if prefix else (), p) for p in found)
        return admitted

    def _strange(self, topology: Topology, prefix: DataPath) -> Iterator[Problem]:
        """What of this host a stranger's report would use."""
        yield from strangers.uses(topology, prefix, ("topology",))
        expected = strangers.EXPECTED
        environment = self.report.environment
        if environment.kernel is not None and not strangers.is_kernel_name(environment.kernel):
            message = f"the kernel '{environment.kernel}' is a path on this host"
            yield Problem(("environment", "kernel"), message, expected)
        if environment.qemu is not None:
            message = f"'{environment.qemu}' is a program on this host"
            yield Problem(("environment", "qemu"), message, expected)

    def _in_environment(self, topology: Topology) -> Topology:
        data = to_data(topology)
        for node in data["nodes"].values():
            _put_environment(node, self.report.environment)
        try:
            topology = from_data(data)
        except ValidationError as error:
            path = ("environment",)
            found = explain(error, Topology)
            raise self.file.error(
                [Problem(path, p.message, p.expected, p.nearest) for p in found]
            ) from None
        if self.report.environment.engine is not None:
            topology = with_overrides(topology, engine=self.report.environment.engine)
        return topology


def _put_environment(node: dict[str, Any], environment: Environment) -> None:
    iommu = node["iommu"]
    if environment.iommu_kind is not None:
        iommu["kind"] = environment.iommu_kind
        if environment.iommu_kind == "none":
            iommu["mode"] = "off"
    if environment.iommu_mode is not None:
        iommu["mode"] = environment.iommu_mode
    if environment.cpu is not None:
        node["machine"]["cpu"] = environment.cpu
    if environment.kernel is not None:
        node["kernel"] = environment.kernel
    node["kernel_args"] = [*node["kernel_args"], *environment.kernel_args]


def _below(path: DataPath, problem: Problem) -> Problem:
    """The problem of a part of the report, in the whole."""
    return Problem(
        (*path, *problem.path),
        problem.message,
        problem.expected,
        problem.nearest,
        problem.at_key,
    )


def is_shipped_topology(word: str) -> bool:
    """A topology of that name comes with the testbed."""
    from testbed.chosen_topology import shipped_topologies  # noqa: PLC0415  seldom used

    return word in shipped_topologies()


def shipped_reports() -> dict[str, Path]:
    """The reports that come with the testbed, by name."""
    folder = paths.data_dir("topologies") / "reports"
    return {p.name.removesuffix(SUFFIX): p for p in sorted(folder.glob(f"*{SUFFIX}"))}


def find_reports(word: str) -> list[Path]:
    """The files that a word of the command line means: a file, a folder of reports, or a shipped
    report by its name.

    :raises InputError: none.
    """
    path = Path(word)
    if path.is_dir():
        if found := sorted(path.glob(f"*{SUFFIX}")):
            return found
        raise InputError(diagnostics=[Diagnostic(word, 0, 0, f"no *{SUFFIX} in this folder")])
    shipped = shipped_reports()
    if path.exists() or "/" in word or word.endswith(".yaml"):
        return [path]
    if word not in shipped:
        known = f"a file, or one of {listing(shipped)}"
        near = nearest(word, shipped)
        raise InputError(diagnostics=[Diagnostic(word, 0, 0, "no such report", known, near)])
    return [shipped[word]]
