# SPDX-License-Identifier: Apache-2.0
"""What changed between two runs: verdicts, environment, figures; and the verb that says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.cli import main
from testbed.results.changes import Kind, changes
from testbed.results.changes_text import lines
from testbed.results.evidence import Counter
from testbed.results.verdicts import Outcome, Verdict
from tests.unit.page.run_folder import report_record, run_record, write_run


def outcome(verdict: Verdict, name: str = "A-1", value: int = 0, unit: str = "bytes") -> Outcome:
    evidence = (Counter("moved", value, unit),) if value else ()
    return Outcome((name,), f"test_{name}", verdict, f"{verdict} it is", evidence, 0.1)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (Verdict.PASS, Verdict.FAIL, Kind.BROKEN),
        (Verdict.SKIP, Verdict.LOST, Kind.BROKEN),
        (Verdict.FAIL, Verdict.PASS, Kind.FIXED),
        (Verdict.ERROR, Verdict.PASS, Kind.FIXED),
        (Verdict.FAIL, Verdict.LOST, Kind.CHANGED),
        (Verdict.PASS, Verdict.SKIP, Kind.HIDDEN),
        (Verdict.FAIL, Verdict.SKIP, Kind.HIDDEN),
        (Verdict.SKIP, Verdict.PASS, Kind.SHOWN),
        (None, Verdict.PASS, Kind.NEW),
        (Verdict.PASS, None, Kind.GONE),
    ],
)
def test_every_change_of_a_verdict_has_its_word(
    before: Verdict | None, after: Verdict | None, kind: Kind
) -> None:
    both = outcome(Verdict.PASS, "B-1")
    runs = [run_record([both, *([outcome(v)] if v else [])]) for v in (before, after)]
    found = changes(*runs)
    assert [(each.name, each.kind) for each in found.verdicts] == [("A-1", kind)]
    assert found.same == 1
    assert not found.is_same


def test_the_same_run_has_not_changed() -> None:
    found = changes(run_record(), run_record(started="2027-01-01T00:00:00+00:00"))
    assert found.is_same
    assert not found.environment
    assert not found.figures


def test_the_words_of_a_report_are_compared() -> None:
    runs = [
        run_record([Outcome((), "bug", verdict, word)], reports=[report_record(word)])
        for word, verdict in (("REPRODUCED", Verdict.FAIL), ("FIXED", Verdict.PASS))
    ]
    (change,) = changes(*runs).verdicts
    assert (change.kind, change.before, change.after) == (Kind.FIXED, "REPRODUCED", "FIXED")


def test_the_environment_is_compared_value_by_value() -> None:
    before, after = run_record(kernel="7.2.12"), run_record(kernel="7.3.4", mutation="skip-unmap")
    after = replace(after, topology={**after.topology, "rack": "other"})
    found = {each.name: (each.before, each.after) for each in changes(before, after).environment}
    assert found["kernels.default.release"] == ("7.2.12", "7.3.4")
    assert found["deliberate break"] == ("none", "skip-unmap")
    assert found["topology.rack"] == ("quad-gpu", "other")
    assert len(found) == 4  # and the build-id


def test_figures_are_compared_times_only_if_they_doubled() -> None:
    def figures(before: Outcome, after: Outcome) -> list[str]:
        return [each.name for each in changes(run_record([before]), run_record([after])).figures]

    good = Verdict.PASS
    assert figures(outcome(good, value=10), outcome(good, value=11)) == ["A-1 test_A-1: moved"]
    assert not figures(outcome(good, value=10, unit="ns"), outcome(good, value=19, unit="ns"))
    assert figures(outcome(good, value=10, unit="ns"), outcome(good, value=20, unit="ns"))
    slow = replace(outcome(good), duration_s=0.9)
    assert figures(outcome(good), slow) == ["A-1: duration"]


def test_the_text_is_plain_and_worst_first() -> None:
    before = [outcome(Verdict.FAIL, "A-1"), outcome(Verdict.PASS, "B-1")]
    after = [
        outcome(Verdict.PASS, "A-1"),
        replace(outcome(Verdict.FAIL, "B-1"), reason="\x1b[31mred\nline"),
    ]
    text = "\n".join(lines(changes(run_record(before), run_record(after))))
    assert text.index("B-1") < text.index("A-1")
    assert "\x1b" not in text
    assert "2 verdicts changed, 0 are the same" in text


def run_verb(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(str(ended.value.code))


def test_the_verb_answers_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path / "a", run_record([outcome(Verdict.PASS)]))
    other = write_run(tmp_path / "b", run_record([outcome(Verdict.FAIL)]))
    assert run_verb("diff", one, one) == 0
    assert run_verb("diff", one, other) == 1
    capsys.readouterr()
    assert run_verb("diff", one, other, "--format", "json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["format"] == "testbed.diff/1"
    assert said["verdicts"][0]["kind"] == "broken"
    assert run_verb("diff", one, tmp_path / "none") == 2
    assert "no such run" in capsys.readouterr().err


def test_the_page_verb_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a")
    assert run_verb("page", run) == 0
    assert capsys.readouterr().out.strip() == str(run / "page.html")
    assert (run / "page.html").read_text().startswith("<!doctype html>")
    assert run_verb("page", run, "-o", tmp_path / "no/such/folder.html") == 2
    assert "cannot write" in capsys.readouterr().err
    assert run_verb("page", run, "-o", "-", "--against", run) == 0
    assert "no verdict changed" in capsys.readouterr().out
