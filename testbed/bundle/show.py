# SPDX-License-Identifier: Apache-2.0
"""What is in a bundle, for a person and as data; it is only read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from testbed.bundle.archive import Bundle
from testbed.results import options, record
from testbed.results.ktap import one_line
from testbed.results.record import RunRecord


def lines(found: Bundle) -> Iterator[str]:
    """Line by line; a stranger's words without control characters."""
    for line in _lines(found):
        yield "  " * (len(line) - len(line.lstrip())) + one_line(line)


def _lines(found: Bundle) -> Iterator[str]:
    written, asked = _parts(found)
    size_bytes = sum(each.size_bytes for each in found.manifest.members)
    members = found.manifest.members
    yield f"{found.name}: {found.manifest.kind}, {len(members)} members, {size_bytes} bytes"
    yield f" made by testbed {found.manifest.tool_version}, run {written.started}"
    yield f" command: {' '.join(written.command)}"
    for each in written.reports:
        yield f" {each.word} {each.file}: {each.title}"
        yield f" {each.link}"
        yield f" {each.reason}"
        for name, value in each.variables.items():
            yield f" -s {name}={value}"
    if asked.verb == "run":
        yield f" suites: {', '.join(asked.suites) or 'the default'}"
        for requirement in written.requirements:
            yield f" {requirement.verdict} {requirement.requirement}: {requirement.reason}"
    yield " runs on:"
    for name, value in _runs_on(written).items():
        yield f"  {name}: {value}"
    yield " members:"
    for member in members:
        cut = f", {member.cut_bytes} bytes of its middle left out" if member.cut_bytes else ""
        yield f"  {member.name}: {member.size_bytes} bytes{cut}"
    for left in found.manifest.left_out:
        yield f" left out: {left.name}: {left.why}"
    for words in found.manifest.scrubbed:
        yield f" not in it: {words}"


def _parts(found: Bundle) -> tuple[RunRecord, options.RunOptions]:
    name = found.name
    written = record.parse_record(f"{name}/{record.FILE_NAME}", found.member(record.FILE_NAME))
    asked = options.read_options(f"{name}/{options.FILE_NAME}", found.member(options.FILE_NAME))
    return written, asked


def _runs_on(written: RunRecord) -> dict[str, str]:
    versions = written.versions
    kernels = versions.get("kernels")
    said = {
        "QEMU": f"{versions.get('qemu')} ({versions.get('qemu_package')})",
        "accelerator": str(versions.get("accelerator")),
    }
    for name, kernel in kernels.items() if isinstance(kernels, Mapping) else ():
        if isinstance(kernel, Mapping):
            said[f"kernel {name}"] = f"{kernel.get('release')}, build-id {kernel.get('build_id')}"
    nodes = written.topology.get("nodes")
    for name, node in nodes.items() if isinstance(nodes, Mapping) else ():
        if isinstance(node, Mapping):
            iommu, machine = node.get("iommu"), node.get("machine")
            if isinstance(iommu, Mapping) and isinstance(machine, Mapping):
                said[str(name)] = (
                    f"CPU {machine.get('cpu')}, IOMMU {iommu.get('kind')} {iommu.get('mode')}"
                )
    said["host"] = ", ".join(str(value) for value in written.host.values())
    return said


def data(found: Bundle) -> dict[str, Any]:
    """The same as plain values."""
    written, asked = _parts(found)
    return {
        "manifest": found.manifest.model_dump(mode="json", by_alias=True),
        "started": written.started,
        "exit_code": written.exit_code,
        "suites": list(asked.suites),
        "reports": [{"title": each.title, "word": each.word} for each in written.reports],
        "verdicts": {each.requirement: str(each.verdict) for each in written.requirements},
        "runs_on": _runs_on(written),
    }
