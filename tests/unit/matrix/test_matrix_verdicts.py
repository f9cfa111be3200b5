# SPDX-License-Identifier: Apache-2.0
"""What the end of a cell's run means: the record's word, or what kept it from having one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.matrix.child import ChildEnd
from testbed.matrix.run_cell import judged
from testbed.results.record import FILE_NAME, RunRecord, write_record
from testbed.results.verdicts import Verdict
from tests.unit.results_samples import sample_record

SAID = "testbed: there is no IOMMU of that kind\nhint: take another"


def verdict_of(folder: Path, status: int, record: RunRecord | None) -> tuple[Verdict, str]:
    if record is not None:
        write_record(record, folder / FILE_NAME)
    verdict, reason, _ = judged(ChildEnd(status, "ended", 1.0, SAID), folder)
    return verdict, reason


@pytest.mark.parametrize(
    ("status", "left", "verdict", "reason"),
    [
        (125, None, Verdict.SKIP, "there is no IOMMU of that kind"),
        (2, None, Verdict.SKIP, "there is no IOMMU of that kind"),
        (0, None, Verdict.ERROR, "the run ended with 0 and no record: "),
        (-9, None, Verdict.ERROR, "the run died of signal 9: "),
        (1, 1, Verdict.FAIL, "MAP-02 both_ways[gpu0-gpu1]: bytes differ"),
        (0, 1, Verdict.ERROR, "the run ended with 0, though its record says 1: "),
        (130, 130, Verdict.ERROR, "the run was interrupted by someone else"),
    ],
)
def test_ends(tmp_path: Path, status: int, left: int | None, verdict: Verdict, reason: str) -> None:
    record = None if left is None else replace(sample_record(), exit_code=left)
    found, said = verdict_of(tmp_path, status, record)
    assert (found, said[: len(reason)]) == (verdict, reason)


def test_a_record_without_a_test(tmp_path: Path) -> None:
    found, said = verdict_of(tmp_path, 0, replace(sample_record(), outcomes=(), exit_code=0))
    assert found is Verdict.ERROR
    assert "ended with 0 and a record without any test" in said


@pytest.mark.parametrize("status", [0, 2, 125, -15])
def test_a_record_of_another_version_is_no_missing_one(tmp_path: Path, status: int) -> None:
    file = tmp_path / FILE_NAME
    write_record(sample_record(), file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": "testbed.run/999"}))
    found, said = verdict_of(tmp_path, status, None)
    assert found is Verdict.ERROR
    assert f"the run ended with {status}, and left {file}" in said
    assert "is not a record of this version: schema 'testbed.run/999'" in said
