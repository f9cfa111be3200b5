# SPDX-License-Identifier: Apache-2.0
"""The page of what holds under which IOMMU."""

from __future__ import annotations

from testbed.harness.iommu_matrix import KINDS, page, topology
from testbed.results.record import RunInfo, RunRecord, make_record
from testbed.results.verdicts import Outcome, Verdict


def record(*outcomes: Outcome, kernel: str = "7.2") -> RunRecord:
    versions = {"qemu": "11.1.2", "accelerator": "tcg", "kernels": {"k": {"release": kernel}}}
    return make_record(RunInfo(versions=versions), outcomes, duration_s=1)


def test_each_reason_is_told_once() -> None:
    shown = record(Outcome(("MAP-01",), "a", Verdict.PASS, "it faults"))
    skipped = record(
        Outcome(("MAP-01",), "a", Verdict.SKIP, "no | records"),
        Outcome(("MAP-02",), "b", Verdict.SKIP, "no | records"),
        Outcome(("MAP-03",), "c", Verdict.FAIL, "bytes differ"),
        kernel="generic",
    )
    records = {kind.name: shown for kind in KINDS} | {"amd": skipped}
    text = page(records)
    assert "| MAP-01 | PASS | PASS | PASS | SKIP [1](#reasons) |" in text
    assert "| MAP-03 |  |  |  | FAIL [2](#reasons) |" in text
    assert text.count("1. SKIP: no \\| records") == 1
    assert "| AMD | 11.1.2 | generic | tcg |" in text


def test_every_column_is_a_rack_of_its_own() -> None:
    racks = [topology(kind) for kind in KINDS]
    assert len({rack.rack for rack in racks}) == len(KINDS)
    assert [rack.nodes["host0"].iommu.kind for rack in racks] == ["intel", "intel", "virtio", "amd"]
