# SPDX-License-Identifier: Apache-2.0
"""The forms a run is written in: record, KTAP, JUnit, table."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from testbed.errors import InputError
from testbed.results.junit import to_junit, write_junit
from testbed.results.ktap import KtapStream
from testbed.results.record import json_schema, load_record, write_record
from testbed.results.table import print_table, summary
from testbed.results.verdicts import Outcome, Verdict, by_requirement
from tests.unit.results_samples import DEVICES, OUTCOMES, sample_record


class TestRecord:
    def test_it_reads_back_as_the_same_values(self, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        write_record(sample_record(), path)
        assert load_record(path) == sample_record()
        write_record(sample_record(DEVICES), path)
        assert load_record(path) == sample_record(DEVICES)
        assert [p.name for p in tmp_path.iterdir()] == ["record.json"]

    def test_it_says_its_version_and_the_whole_outcome(self, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        write_record(sample_record(), path)
        data = json.loads(path.read_text())
        assert data["schema"] == "testbed.run/1"
        assert data["exit_code"] == 1
        assert [r["verdict"] for r in data["requirements"]][:2] == ["LOST", "PASS"]
        assert [e["kind"] for e in data["outcomes"][0]["evidence"]] == [
            "bytes", "fault", "no-fault", "mapping", "counter", "note",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is no JSON"),
            ("[]", "schema None"),
            ('{"schema": "testbed.run/9"}', "schema 'testbed.run/9', expected 'testbed.run/1'"),
            ('{"schema": "testbed.run/1"}', "command: Field required"),
        ],
    )
    def test_what_is_no_record_is_refused(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "record.json"
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_record(path)

    def test_a_missing_file_is_bad_input(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            load_record(tmp_path / "none.json")

    def test_a_key_that_nobody_knows_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        write_record(sample_record(), path)
        path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
        with pytest.raises(InputError, match="colour"):
            load_record(path)

    def test_a_failed_write_leaves_the_old_record(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "record.json"
        path.write_text("old")

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_record(sample_record(), path)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_the_schema_knows_every_field(self) -> None:
        schema = json_schema()
        assert schema["title"] == "testbed.run/1"
        assert "outcomes" in schema["properties"]
        assert "FaultSeen" in schema["$defs"]


def test_ktap_gives_each_end_its_own_line() -> None:
    stream = io.StringIO()
    ktap = KtapStream(stream)
    ktap.plan(6)
    for outcome in OUTCOMES:
        ktap.outcome(outcome)
    ktap.end("interrupted")
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["KTAP version 1", "1..6"]
    assert [line for line in lines[2:] if not line.startswith("# ")] == [
        "ok 1 MAP-01 unmapped",
        "not ok 2 MAP-02 both_ways[gpu0-gpu1]",
        "ok 3 MAP-08 scalable # SKIP no first-level tables in this QEMU",
        "not ok 4 MAP-06 FLT-05 unmap _ twice # LOST QEMU ended",
        "not ok 5 own_test # ERROR KeyError: 'x'",
    ]
    assert lines[3] == "# FAIL bytes differ"
    assert "#   console: Kernel panic" in lines
    assert lines[-2:] == ["# 1 of 6 tests not run", "# interrupted"]
    assert all(line.isprintable() for line in lines)


def test_junit_tells_failure_error_and_skip_apart(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    write_junit(sample_record(), path)
    root = ElementTree.fromstring(path.read_bytes())  # noqa: S314  # our own output
    suite = root.find("testsuite")
    assert suite is not None
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "5",
        "failures": "1",
        "errors": "2",
        "skipped": "1",
    }
    ends = [
        next(((e.tag, e.get("type")) for e in case if e.tag != "system-out"), None)
        for case in suite.iter("testcase")
    ]
    assert ends == [
        None,
        ("failure", "FAIL"),
        ("skipped", "SKIP"),
        ("error", "LOST"),
        ("error", "ERROR"),
    ]


def test_junit_survives_what_a_console_says() -> None:
    text = to_junit(sample_record()).decode()
    assert "\\x1b[0mnot \\x00syncing &lt;&amp;&gt;" in text


def test_the_table_names_every_requirement_and_where_to_look() -> None:
    stream = io.StringIO()
    print_table(sample_record(), Path("/runs/x"), Console(file=stream, width=100))
    text = stream.getvalue()
    for word in ("MAP-01", "MAP-02", "FLT-05", "PASS", "FAIL", "SKIP", "LOST", "own_test"):
        assert word in text
    assert text.splitlines()[-1] == summary(sample_record(), Path("/runs/x"))
    assert summary(sample_record(), Path("/runs/x")) == (
        "FAIL: 1 pass, 1 fail, 1 skip, 1 lost, 1 error in 1.2 s (exit 1); everything is in /runs/x"
    )


def test_a_run_with_faults_on_purpose_or_a_dead_model_says_so() -> None:
    """But not of faults that a suite needs for what it judges, or that never struck."""
    assert (
        " in 1.2 s with faults injected (host0/gpu0: drop write nth=3, struck 1; host0/gpu0:"
        " engine stuck; host0/gpu1: its model died) (exit 1);"
        in summary(sample_record(DEVICES), Path("/r"))
    )
    many = replace(DEVICES[0], rules=DEVICES[0].rules[:1] * 5, actions=())
    assert "struck 1 and 2 more) (exit" in summary(sample_record((many,)), Path("/r"))


def test_an_interrupted_run_is_no_pass() -> None:
    record = sample_record()
    outcome = Outcome(("X-1",), "t", Verdict.PASS)
    record = replace(record, outcomes=(outcome,), exit_code=130)
    assert summary(record, Path("/r")).startswith("INTERRUPTED: 1 pass in ")


def test_a_verdict_is_never_coloured_into_another() -> None:
    """Markup in a reason is text, not style."""
    stream = io.StringIO()
    record = sample_record()
    outcome = Outcome(("X-1",), "t", Verdict.FAIL, "[bold]not markup[/bold]")
    record = replace(record, outcomes=(outcome,), requirements=by_requirement([outcome]))
    print_table(record, Path("/r"), Console(file=stream, width=100))
    assert "[bold]not markup[/bold]" in stream.getvalue()


def test_half_a_character_of_a_guests_is_no_reason_to_lose_the_record(tmp_path: Path) -> None:
    record = sample_record()
    record = replace(record, outcomes=(replace(OUTCOMES[1], reason="half \ud800 a character"),))
    write_record(record, tmp_path / "record.json")
    read = load_record(tmp_path / "record.json")
    assert read.outcomes[0].reason == "half ? a character"
    assert read.requirements == record.requirements
