# SPDX-License-Identifier: Apache-2.0
"""What a bundle holds, read as a stranger's: as much as can be known without starting anything.

Of the bundle only its topology, its report and the names of its suites are used, and these only
as a stranger's topology and report would be. No command line of it is run, no code is in it.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from testbed.bundle.archive import Bundle
from testbed.errors import CapabilityMissing, Diagnostic, ExitCode, InputError
from testbed.host import prepare
from testbed.reports import load, strangers
from testbed.reports.judge import Word
from testbed.reports.load import Case, Overrides
from testbed.reports.runner import REPORT_YAML
from testbed.results import options as run_options
from testbed.results import record
from testbed.results.options import RunOptions
from testbed.results.record import RunRecord
from testbed.topology.model import Topology, from_data, with_overrides
from testbed.topology.placement import attempt
from testbed.topology.problem import Problem
from testbed.topology.validation import explain


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
    """The parts of a bundle; ``case`` of a report, else None."""

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
    from testbed.harness import shipped  # noqa: PLC0415  only of runs
    from testbed.instruments.mutations import parse_mutation  # noqa: PLC0415
    from testbed.instruments.negotiation_rules import parse_policy  # noqa: PLC0415

    parse_mutation(asked.mutation or "none")
    parse_policy(asked.policy)
    for word in asked.suites:
        if word in shipped.PAYLOAD_SUITES:
            raise CapabilityMissing(f"replaying '{word}': programs of its maker's are in no bundle")
        if word not in (*shipped.SUITES, shipped.ALL_SUITES):
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
