# SPDX-License-Identifier: Apache-2.0
"""Run folders for the tests of the page: an honest one, a hostile one, and a large one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from testbed.results import record
from testbed.results.evidence import BytesChecked, Counter, FaultSeen, MappingUsed, Note, Witness
from testbed.results.record import ActionRecord, DeviceRecord, RuleRecord, RunInfo, RunRecord
from testbed.results.report_record import ConditionRecord, ReportRecord, StepRecord
from testbed.results.verdicts import ConsoleSpan, Outcome, Verdict
from testbed.topology import load
from testbed.topology.model import to_data
from tests.unit.results_samples import DEVICES, FAULT, OUTCOMES

TOPOLOGIES = Path(__file__).parents[3] / "topologies"

EVIL = (
    "</script><script>window.owned=1</script>",
    "\"'><img src=x onerror=window.owned=1>",
    "</style><svg/onload=window.owned=1>",
    "{{ 7*191 }}{% for x in y %}",
    "--><iframe srcdoc='<script>parent.owned=1</script>'>",
    "javascript:window.owned=1",
    "\u202eright to left\u2066 \x1b]0;title\x07 \x00 \x9b31m",
    "a\nb\r\nc" + "x" * 5000,
)

MOVED = Outcome(
    ("MAP-03",),
    "mapped[gpu0-gpu1]",
    Verdict.PASS,
    "bytes arrive",
    (
        MappingUsed(0x1000, 4096, "gpu1.vram+0x0", read=True, write=True),
        BytesChecked("gpu1.vram+0x0", 4096, Witness.GUEST, "ab" * 32, "ab" * 32),
        BytesChecked("gpu1.vram+0x0", 4096, Witness.HOST, "ab" * 32, "ab" * 32),
        Counter("gpu0 wrote by path 'iommu'", 4096, "bytes"),
    ),
    0.1,
)

CONSOLE = b"testbed: ready\n[ 1.0] one\n[ 2.0] DMAR: [DMA Write] fault addr 0x1000\n[ 3.0] last\n"


def topology_data(name: str = "quad-gpu") -> dict[str, Any]:
    """A shipped topology, as a run keeps it."""
    return to_data(load.load(TOPOLOGIES / f"{name}.yaml", {}))


def run_record(
    outcomes: Sequence[Outcome] = (*OUTCOMES, MOVED),
    *,
    mutation: str = "",
    started: str = "2026-07-01T12:00:00+00:00",
    kernel: str = "7.2.12",
    name: str = "quad-gpu",
    reports: Sequence[ReportRecord] = (),
    code: int | None = None,
) -> RunRecord:
    """The record of a run on a shipped rack."""
    info = RunInfo(
        command=("testbed", "run"),
        started=started,
        versions={
            "qemu": "11.1.2",
            "accelerator": "tcg",
            "kernels": {"default": {"release": kernel, "build_id": f"id-{kernel}"}},
        },
        host={"cpus": 2, "memory_bytes": 8 << 30},
        topology=topology_data(name),
        mutation=mutation,
        devices=DEVICES,
        reports=tuple(reports),
    )
    made = record.make_record(info, tuple(outcomes), duration_s=3.0)
    return made if code is None else replace(made, exit_code=code)


def write_run(
    folder: Path,
    made: RunRecord | None = None,
    *,
    racks: Iterable[str] = ("rack",),
    topology: dict[str, Any] | None = None,
    console: bytes = CONSOLE,
    calls: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write it, with a folder for each rack."""
    folder.mkdir(parents=True, exist_ok=True)
    data = topology_data() if topology is None else topology
    record.write_record(run_record() if made is None else made, folder / record.FILE_NAME)
    for rack in racks:
        for node in data["nodes"]:
            logs = folder / rack / node
            logs.mkdir(parents=True)
            (logs / "console.log").write_bytes(console)
            (logs / "qemu.log").write_bytes(b"vtd_dmar_fault sid 0x301\n")
            lines = "".join(json.dumps(call) + "\n" for call in calls)
            (logs / "observations.jsonl").write_text(lines)
        (folder / rack / "topology.json").write_text(json.dumps(data))
    return folder


def report_record(word: str = "REPRODUCED", evil: str = "") -> ReportRecord:
    """A bug report that happened again."""
    return ReportRecord(
        file=f"a.report.yaml{evil}",
        title=f"a raw address{evil}",
        link=evil or "https://example.org/bug?a=1&b=2",
        word=word,
        reason=f"the IOMMU refuses it{evil}",
        variables={f"exporter{evil}": f"v3{evil}"},
        stand_ins=(f"a GPU for an accelerator{evil}",),
        conditions=(
            ConditionRecord("as_reported", f"refused{evil}", holds=True, reason=f"fault{evil}"),
            ConditionRecord("when_fixed", "arrived", holds=False, reason="nothing"),
        ),
        steps=(StepRecord(1, f"call x{evil}", {f"errno{evil}": 5, "hex": f"{evil}00"}, 0.1),),
        boot_s=1.0,
        duration_s=2.0,
    )


def hostile_run(folder: Path) -> Path:
    """All that a stranger can write into a run says something evil."""
    evil = " ".join(EVIL)
    fault = replace(FAULT, requester=evil, reason_text=evil)
    place = BytesChecked(evil, 1, Witness.GUEST, evil, "ab" * 32)
    evidence = (
        fault,
        place,
        MappingUsed(1, 1, evil, read=True, write=True),
        Counter(evil, 1, evil),
        Note(evil),
        FaultSeen("0000:03:00.1", 1, FAULT.access, 5, Witness.MACHINE, pasid=1),
    )
    outcomes = [
        Outcome((each,), each, Verdict.FAIL, each, evidence, 0.1, evil, evil) for each in EVIL
    ]
    spans = (ConsoleSpan("rack", "host0", 0, 10_000),)
    outcomes[0] = replace(outcomes[0], started_s=1e9, console=spans)
    made = run_record(outcomes, mutation=evil, reports=[report_record(evil, evil)])
    data = topology_data()
    data["description"] = evil
    device = DeviceRecord(
        "rack",
        evil,
        evil,
        lost=9,
        counters={"events": {evil: 1}},
        rules=(RuleRecord(evil, evil, armed=True, seen=1, struck=1),),
        actions=(ActionRecord(evil, evil),),
    )
    made = replace(
        made,
        command=("testbed", evil),
        started=evil,
        versions={evil: evil, "kernels": {evil: {"release": evil, "build_id": evil}}},
        host={evil: evil},
        topology={**data, "rack": evil},
        devices=(device,),
        tool_version=evil,
    )
    call = {
        "at_s": 1e9 + 0.01,
        "method": evil,
        "elapsed_s": 0.1,
        "error": {"message": evil},
    }
    log = {
        "method": "kmsg.since",
        "result": {"records": [{"sequence": 1, "time_us": 5, "text": evil}]},
    }
    write_run(folder, made, topology=data, console=evil.encode(), calls=[call, log])
    node = folder / "rack" / "<img src=x onerror=owned=1>"
    node.mkdir()
    (node / "console.log").write_text("x\n")
    return folder


def large_run(folder: Path, requirements: int = 500) -> Path:
    """Many requirements, each with evidence, and a log of some megabytes."""
    verdicts = [*[Verdict.PASS] * 20, Verdict.FAIL, Verdict.SKIP, Verdict.LOST, Verdict.ERROR]
    outcomes = [
        replace(
            MOVED,
            requirements=(f"BIG-{number:03}",),
            test=f"big_{number}[gpu0-gpu1]",
            verdict=verdicts[number % len(verdicts)],
            evidence=(*MOVED.evidence * 4, *OUTCOMES[0].evidence * 2),
            started_s=1e9 + number * 0.3,
            duration_s=0.2,
            details="Traceback\n" * 12,
        )
        for number in range(requirements)
    ]
    said = b"".join(b"[%12.6f] a line like any other, number %d\n" % (n, n) for n in range(60000))
    return write_run(folder, run_record(outcomes), console=said)
