# SPDX-License-Identifier: Apache-2.0
"""A run folder, a stranger's too → one HTML file (:mod:`testbed.page.document`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from testbed.page import files, logs, peers
from testbed.page.document import document
from testbed.page.load import RackFolder, Run, load_run, versions_of
from testbed.page.matrix_view import MatrixView, matrix_view
from testbed.page.view import (
    MOST_CALLS,
    WORST_FIRST,
    Anchors,
    RequirementView,
    calls_by_test,
    number,
    requirement_views,
    safe_link,
    shortened,
    timeline,
)
from testbed.results.changes import changes
from testbed.results.record import DeviceRecord, RunRecord, injected
from testbed.results.verdicts import Outcome, Verdict, combine, count
from testbed.topology import graph, graph_svg
from testbed.topology.peers import peers as devices_of

# Of one log, and of all logs of a run together: what is read at all.
MOST_LOG_HEAD_BYTES = 128 << 10
MOST_LOG_TAIL_BYTES = 256 << 10
MOST_LOGS_BYTES = 4 << 20
MOST_CALLS_BYTES = 32 << 20
MOST_PAIRS = 6000  # of all racks together
MOST_JSON = 200_000  # characters of the topology as text

_LOGS = ("console.log", "qemu.log")
_OBSERVATIONS = "observations.jsonl"
KERNEL_LOG = "kernel log, as the agent read it"

Calls = list[Mapping[str, Any]]  # a node's observations


@dataclass(frozen=True)
class NodeView:
    """One machine: its logs."""

    name: str
    logs: tuple[logs.LogView, ...]


@dataclass(frozen=True)
class RackView:
    """One rack: its picture, its matrix, its devices and its machines."""

    name: str
    anchor: str
    problem: str
    picture: Markup | None
    matrix: MatrixView | None
    matrix_cut: bool
    devices: tuple[DeviceRecord, ...]
    nodes: tuple[NodeView, ...]


def render(run_dir: Path, *, against: Path | None = None) -> str:
    """The page of a run, as the text of an HTML file.

    :param run_dir: what ``testbed run`` or ``testbed repro`` left; nothing in it is trusted.
    :param against: an earlier run to compare with.
    :raises InputError: one of them is no run folder, or its record cannot be read.
    """
    run = load_run(run_dir)
    earlier = load_run(against) if against is not None else None
    anchors = Anchors()
    names = {
        function.bdf: function.name
        for rack in run.racks[:1]
        if rack.plan is not None and len(rack.plan.nodes) == 1
        for node in rack.plan.nodes.values()
        for function in node.functions
    }
    observed = {rack.name: _observed(rack) for rack in run.racks}
    made = [
        (at_s, node, call)
        for nodes in observed.values()
        for node, some in nodes.items()
        for call in some
        if (at_s := number(call.get("at_s"))) is not None
    ]
    calls = calls_by_test(run.record.outcomes, made)
    requirements = requirement_views(run.record.outcomes, anchors, names, calls)
    budget = _Budget(MOST_LOGS_BYTES)
    racks = [
        _rack_view(run, rack, requirements, anchors, budget, observed[rack.name])
        for rack in run.racks
    ]
    outcomes = run.record.outcomes
    counts = count(outcomes)
    return document(
        "page.html.j2",
        script="page.js",
        run=run,
        record=run.record,
        title=_title(run),
        word=_word(run),
        counts={verdict: counts[verdict] for verdict in WORST_FIRST if counts[verdict]},
        requirements=requirements,
        troubles=[
            view for view in requirements if view.verdict not in (Verdict.PASS, Verdict.SKIP)
        ],
        timeline=timeline(requirements),
        racks=racks,
        injected=injected(run.record),
        environment=_environment_of(run),
        topologies=_topology_texts(run.record),
        judged_by_word=_is_judged_by_word(run),
        compared=changes(earlier.record, run.record) if earlier else None,
        against=earlier.record if earlier else None,
        most_calls=MOST_CALLS,
        safe_link=safe_link,
        shortened=shortened,
    )


def _title(run: Run) -> str:
    reports = run.record.reports
    if len(reports) == 1:
        return reports[0].title
    if reports:
        return f"{len(reports)} bug reports"
    every = (run.record.topology, *run.record.topologies.values())
    racks = dict.fromkeys(str(each["rack"]) for each in every if each.get("rack"))
    return ", ".join(racks) or "a run without a rack"


def _is_judged_by_word(run: Run) -> bool:
    """It is all bug reports: REPRODUCED and FIXED say more than FAIL and PASS."""
    return bool(run.record.reports) and len(run.record.reports) == len(run.record.outcomes)


def _word(run: Run) -> str:
    """The verdict of the whole, in the words of who started it."""
    reports = run.record.reports
    if _is_judged_by_word(run):
        words = {report.word for report in reports}
        return words.pop() if len(words) == 1 else "MIXED"
    if run.record.exit_code == 130:
        return "INTERRUPTED"
    outcomes = run.record.outcomes
    return str(combine(outcome.verdict for outcome in outcomes)) if outcomes else "NO TESTS"


# --- racks


@dataclass
class _Budget:
    """How much of all logs may still be read, and how many pairs the page may still have."""

    left_bytes: int
    left_pairs: int = MOST_PAIRS


def _rack_view(
    run: Run,
    rack: RackFolder,
    requirements: Iterable[RequirementView],
    anchors: Anchors,
    budget: _Budget,
    calls: Mapping[str, Calls],
) -> RackView:
    prefix = rack.name.removesuffix(rack.label)
    picture = table = None
    pairs = 0
    if rack.plan is not None:
        drawn = graph_svg.svg(graph.layout(rack.plan), style=False)
        picture = Markup(drawn)  # noqa: S704  (the drawing escapes)
        pairs = len(devices_of(rack.plan)) ** 2
        if pairs <= budget.left_pairs:
            budget.left_pairs -= pairs
            ours = _outcomes_of(run, rack, prefix)
            table = matrix_view(rack.plan, peers.run_matrix(rack.plan, calls, ours))
    tests = [test for view in requirements for test in view.tests]
    nodes = []
    for name, folder in rack.nodes.items():
        marks = [
            logs.Mark(span.begin_bytes, span.end_bytes, test.outcome.title, test.anchor)
            for test in {test.anchor: test for test in tests}.values()
            for span in test.outcome.console
            if (span.rack, span.node) == (rack.label, name) and test.outcome.test.startswith(prefix)
        ]
        nodes.append(NodeView(name, tuple(_logs(folder, calls[name], marks, budget))))
    in_record = (rack.name, rack.label) if run.parts == 1 else (rack.name,)
    devices = [device for device in run.record.devices if device.rack in in_record]
    return RackView(
        rack.name,
        anchors.new("rack", rack.name),
        rack.problem,
        picture,
        table,
        rack.plan is not None and table is None and pairs > 1,
        tuple(devices),
        tuple(nodes),
    )


def _outcomes_of(run: Run, rack: RackFolder, prefix: str) -> list[Outcome]:
    """Tests that were about this rack: a variant's are not about the main one, and reverse."""
    if rack.label != "rack":
        return []
    return [outcome for outcome in run.record.outcomes if outcome.test.startswith(prefix)]


def _observed(rack: RackFolder) -> dict[str, Calls]:
    return {name: _calls(folder) for name, folder in rack.nodes.items()}


def _calls(folder: Path) -> Calls:
    """A node's observations; lines that are none are passed over."""
    part = files.read(folder / _OBSERVATIONS, MOST_CALLS_BYTES)
    found: Calls = []
    for line in part.head.splitlines() if part else ():
        try:
            call = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(call, dict):
            found.append(call)
    return found


def _logs(
    folder: Path, calls: Iterable[Mapping[str, Any]], marks: list[logs.Mark], budget: _Budget
) -> Iterable[logs.LogView]:
    for name in _LOGS:
        head = min(MOST_LOG_HEAD_BYTES, budget.left_bytes)
        part = files.read(folder / name, head, min(MOST_LOG_TAIL_BYTES, budget.left_bytes - head))
        if part is not None:
            budget.left_bytes -= len(part.head) + len(part.tail)
            own = marks if name == "console.log" else []
            yield logs.view(name, part.head, part.tail, part.cut_bytes, own)
    kernel = _kernel_log(calls)[: budget.left_bytes]
    if kernel:
        budget.left_bytes -= len(kernel)
        yield logs.view(KERNEL_LOG, kernel)


def _kernel_log(calls: Iterable[Mapping[str, Any]]) -> bytes:
    """The records of ``kmsg.since`` in order, each once, as dmesg would print them."""
    found: dict[int, str] = {}
    for call in calls:
        result = call.get("result")
        records = result.get("records") if isinstance(result, dict) else None
        if call.get("method") != "kmsg.since" or not isinstance(records, list):
            continue
        for record in records:
            if isinstance(record, dict) and isinstance(record.get("sequence"), int):
                stamp = (number(record.get("time_us")) or 0.0) / 1e6
                text = str(record.get("text", "")).replace("\n", " ")
                found[record["sequence"]] = f"[{stamp:12.6f}] {text}"
    return "\n".join(found[number] for number in sorted(found)).encode(errors="replace")


# --- the environment


def _environment_of(run: Run) -> list[tuple[str, str]]:
    record, versions = run.record, run.record.versions
    if not versions and run.racks:
        versions = versions_of(run.racks[0])
    rows = [("command", " ".join(record.command)), ("started", record.started)]
    rows.append(("testbed", record.tool_version))
    for name, value in versions.items():
        if name == "packages":
            continue
        if name == "kernels" and isinstance(value, dict):
            for kernel, facts in value.items():
                known = facts if isinstance(facts, dict) else {}
                said = f"{known.get('release', '?')}, build-id {known.get('build_id', '?')}"
                rows.append((f"kernel {kernel}", said))
            continue
        rows.append(
            (name.replace("_", " "), value if isinstance(value, str) else json.dumps(value))
        )
    for name, value in record.host.items():
        if name.endswith("_bytes") and isinstance(value, int):
            rows.append((f"host {name.removesuffix('_bytes')}", f"{value / 2**30:.1f} GiB"))
        else:
            rows.append((f"host {name}", str(value)))
    return rows


def _topology_texts(record: RunRecord) -> list[tuple[str, str]]:
    """Whose it is, "" if it is everyone's, and the text."""
    several = record.topologies.items() if record.topologies and not record.topology else ()
    left = MOST_JSON
    found = []
    for name, topology in several or (("", record.topology),):
        text = json.dumps(topology, indent=1, default=str)
        cut = text if len(text) <= left else f"{text[:left]}\n… ({len(text):,} characters)"
        left = max(0, left - len(text))
        found.append((name, cut))
    return found
