# SPDX-License-Identifier: Apache-2.0
"""Outcomes and a record of every kind, for the tests of what is written of them."""

from __future__ import annotations

from testbed.results.evidence import (
    Access,
    BytesChecked,
    Counter,
    FaultSeen,
    MappingUsed,
    NoFaultSeen,
    Note,
    Witness,
)
from testbed.results.record import (
    ActionRecord,
    DeviceRecord,
    RuleRecord,
    RunInfo,
    RunRecord,
    make_record,
)
from testbed.results.verdicts import Outcome, Verdict

FAULT = FaultSeen("0000:05:00.1", 0xF4000000, Access.READ, 6, Witness.GUEST, "PTE Read access")

EVERY_EVIDENCE = (
    BytesChecked("gpu1.vram+0x0", 4096, Witness.HOST, "ab" * 32, "ab" * 32),
    FAULT,
    NoFaultSeen((Witness.GUEST, Witness.MACHINE)),
    MappingUsed(0x4000000000, 65536, "gpu1.vram+0x0", read=True, write=False),
    Counter("lost faults", 12, "faults"),
    Note("proves nothing about the mapping code"),
)

OUTCOMES = (
    Outcome(("MAP-01",), "unmapped", Verdict.PASS, "it faults", EVERY_EVIDENCE, 0.25),
    Outcome(("MAP-02",), "both_ways[gpu0-gpu1]", Verdict.FAIL, "bytes differ", (FAULT,), 0.5),
    Outcome(("MAP-08",), "scalable", Verdict.SKIP, "no first-level tables in this QEMU"),
    Outcome(
        ("MAP-06", "FLT-05"),
        "unmap # twice",
        Verdict.LOST,
        "QEMU ended",
        console_tail="Kernel panic\n\x1b[0mnot \x00syncing <&>",
    ),
    Outcome((), "own_test", Verdict.ERROR, "KeyError: 'x'", details="Traceback\n  line 1"),
)


DEVICES = (
    DeviceRecord(
        "rack",
        "host0",
        "gpu0",
        counters={"iommu": {"reads": 1, "read_bytes": 64}, "events": {"interrupts": 2}},
        rules=(
            RuleRecord("drop write nth=3", "command", armed=True, seen=9, struck=1),
            RuleRecord("suite-lost-writes", "suite", armed=False, seen=1, struck=1),
            RuleRecord("poison", "test", armed=False, seen=0, struck=0),
        ),
        actions=(ActionRecord("engine stuck", "test"), ActionRecord("pulled out", "suite")),
    ),
    DeviceRecord("rack-2", "host0", "gpu1", lost=265),
)


def sample_record(devices: tuple[DeviceRecord, ...] = ()) -> RunRecord:
    info = RunInfo(
        command=("testbed", "run"),
        started="2026-11-21T01:02:03+00:00",
        versions={"qemu": "11.1.2", "image": {"sha256": "00"}},
        host={"cpus": 2},
        topology={"rack": "quad-gpu", "nodes": {"host0": {"pcie": []}}},
        devices=devices,
    )
    return make_record(info, OUTCOMES, duration_s=1.25)
