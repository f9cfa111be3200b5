# SPDX-License-Identifier: Apache-2.0
"""Reports as pytest's tests, and the verb as a user meets it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from testbed.errors import ExitCode
from testbed.harness.report_items import ReportOptions
from testbed.harness.runner import Choice, run_suites
from testbed.reports.judge import Word
from testbed.reports.load import Overrides, shipped_reports
from testbed.reports.reference import json_schema, markdown
from testbed.results.record import load_record
from testbed.results.verdicts import Verdict
from tests.contract.fake_rack import FakeSource
from tests.unit.reports.report_text import TEXT, case_of, edited

ROOT = Path(__file__).parents[3]


def run(tmp_path: Path, text: str = TEXT, **options: Any) -> tuple[ExitCode, Any]:
    file = tmp_path / "x.report.yaml"
    file.write_text(text)
    options = {"settings": {}, "overrides": Overrides(), **options}
    choice = Choice([str(file)], reports=ReportOptions(**options))
    result = run_suites(
        choice,
        FakeSource(case_of().topology, tmp_path),
        tmp_path,
        stream=io.StringIO(),
        console=Console(file=io.StringIO()),
    )
    return result.code, load_record(tmp_path / "record.json")


def test_a_reproduced_report_fails_and_a_fixed_one_passes(tmp_path: Path) -> None:
    code, record = run(tmp_path)
    assert code is ExitCode.FAIL
    (outcome,) = record.outcomes
    assert (outcome.test, outcome.verdict) == ("x", Verdict.FAIL)
    assert outcome.reason.startswith("REPRODUCED: it is refused")
    assert {"fault", "bytes"} <= {each.kind for each in outcome.evidence}
    assert record.reports[0].word == "REPRODUCED"
    code, record = run(tmp_path, settings={"raw": "false"})
    assert code is ExitCode.PASS
    assert record.outcomes[0].reason.startswith("FIXED: ")


def test_what_is_expected_turns_round(tmp_path: Path) -> None:
    assert run(tmp_path, expect=Word.REPRODUCED)[0] is ExitCode.PASS
    other: dict[str, Any] = {"settings": {"raw": "false"}, "expect": Word.REPRODUCED}
    assert run(tmp_path, **other)[0] is ExitCode.FAIL


def test_overrides_reach_the_report(tmp_path: Path) -> None:
    overrides = Overrides(iommu_mode="passthrough")
    assert run(tmp_path, overrides=overrides)[0] is ExitCode.PASS


def test_a_wrong_report_is_an_error_in_its_own_words(tmp_path: Path) -> None:
    _, record = run(tmp_path, edited(("  - map: gpu0.vram", "  - mpa: gpu0.vram")))
    (outcome,) = record.outcomes
    assert outcome.verdict is Verdict.ERROR
    assert "did you mean 'map'?" in outcome.details


def test_plain_pytest_leaves_reports_alone_that_nobody_named(tmp_path: Path) -> None:
    (tmp_path / "x.report.yaml").write_text("not: one\n")
    (tmp_path / "test_a.py").write_text("def test_a(): pass\n")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*words, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "1 passed" in done.stdout
    done = subprocess.run(
        [*words, str(tmp_path / "x.report.yaml")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert "unknown key 'not'" in done.stdout
    assert done.returncode == pytest.ExitCode.INTERRUPTED


def repro(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "testbed.cli", "repro", *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )


def test_the_verb_refuses_all_wrong_files_at_once(tmp_path: Path) -> None:
    first, second = tmp_path / "a.report.yaml", tmp_path / "b.report.yaml"
    first.write_text(edited(("seed: 1", "sed: 1")))
    second.write_text(edited(("fault: dma", "fault: dna")))
    done = repro(str(first), str(second))
    assert done.returncode == 2
    assert f"{first}:18:5: unknown key 'sed'" in done.stderr
    assert "did you mean 'dma'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_verb_lists_what_is_shipped() -> None:
    done = repro("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(shipped_reports())
    assert repro().returncode == 2


def test_the_schema_is_generated_and_describes_every_key() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["title"] == "testbed bug report"
    assert "x-expected" not in json.dumps(schema)
    for name, definition in [("the file", schema), *schema["$defs"].items()]:
        assert definition["additionalProperties"] is False, name
        assert definition["description"], name
        for key, value in definition["properties"].items():
            assert value.get("description"), f"{name}: {key}"


def test_the_example_of_the_manual_is_a_report() -> None:
    manual = (ROOT / "docs" / "reports.md").read_text()
    example = manual.split("```yaml\n", 1)[1].split("```", 1)[0]
    assert len(case_of(example).report.steps) == 7


def test_the_field_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "report-fields.md").read_text() == markdown()
