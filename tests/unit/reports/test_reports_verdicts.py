# SPDX-License-Identifier: Apache-2.0
"""Every way in which a report can end, on a rack without machines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import CapabilityMissing, ExitCode, LostError
from testbed.reports import printing
from testbed.reports.judge import Word
from testbed.reports.load import Case, Overrides
from testbed.reports.outcome import exit_code, verdict_of
from testbed.reports.reproduce import Finding, reproduce
from testbed.reports.runner import run_reports
from testbed.results.record import load_record
from testbed.results.verdicts import Verdict
from tests.contract.fake_rack import FakeNode, FakeRack, FakeSource
from tests.unit.reports.report_text import TEXT, case_of, edited

LOG_STEP = '  - kernel_log: ""\n    as: log\nexpect:\n'


@pytest.fixture(autouse=True)
def _log(monkeypatch: pytest.MonkeyPatch) -> None:
    def since(node: FakeNode, sequence: int) -> dict[str, Any]:
        lines = node.do_faults_since(sequence)["records"]
        return {"records": [{"text": f"DMAR: {each['access']}"} for each in lines], "lost": 0}

    monkeypatch.setattr(FakeNode, "do_kmsg_since", since, raising=False)


def source(case: Case, tmp_path: Path, **knobs: Any) -> FakeSource:
    return FakeSource(case.topology, tmp_path, knobs)


def finding_of(text: str, tmp_path: Path, *, knobs: Any = None, **options: Any) -> Finding:
    case = case_of(text, **options)
    return reproduce(case, source(case, tmp_path, **(knobs or {})))


def test_what_was_reported_happens_again(tmp_path: Path) -> None:
    finding = finding_of(TEXT, tmp_path)
    assert finding.word is Word.REPRODUCED
    assert finding.reason == "it is refused; nothing has arrived"
    kinds = {each.kind for each in finding.evidence}
    assert {"fault", "bytes", "mapping", "counter"} <= kinds
    assert finding.steps[0].words == "open gpu0 gpu1"


def test_what_was_fixed_says_so(tmp_path: Path) -> None:
    finding = finding_of(TEXT, tmp_path, settings={"raw": "false"})
    assert finding.word is Word.FIXED
    assert finding.reason == "nothing is refused; it has arrived"


def test_a_domain_that_passes_through_needs_no_mapping(tmp_path: Path) -> None:
    overrides = Overrides(iommu_mode="passthrough")
    finding = finding_of(TEXT, tmp_path, overrides=overrides)
    assert finding.word is Word.FIXED


def test_something_else_is_told_precisely(tmp_path: Path) -> None:
    text = edited(("address: ${peer.bus_address}", "address: ${peer.bus_address+0x100000}"))
    finding = finding_of(text, tmp_path)
    assert finding.word is Word.DIFFERENT
    assert "as reported, but 'it is refused': expected a fault of 0000:01:00.1" in finding.reason
    assert "when fixed, but 'nothing is refused': unexpected fault" in finding.reason


def test_a_report_that_cannot_tell_is_different(tmp_path: Path) -> None:
    text = edited(
        ("are: sent\n", "are_not: sent\n"), ("no_fault: dma", "value: ${dma.faults}\n      is: 1")
    )
    finding = finding_of(text, tmp_path)
    assert finding.word is Word.DIFFERENT
    assert "does not tell the bug from its absence" in finding.reason


def test_a_step_that_fails_is_different_unless_it_may(tmp_path: Path) -> None:
    call = "  - call: no.method\n    as: bad\nexpect:\n"
    finding = finding_of(edited(("expect:\n", call)), tmp_path)
    assert finding.word is Word.DIFFERENT
    assert finding.reason.startswith("step 8 (call no.method) failed: UnknownMethodError")
    may = call.replace("as: bad", "as: bad\n    may_fail: true")
    text = edited(("expect:\n", may), ("fault: dma", "fault: dma")).replace(
        "  when_fixed:",
        '    it fails:\n      value: ${bad.error}\n      contains: "no method"\n  when_fixed:',
    )
    assert finding_of(text, tmp_path).word is Word.REPRODUCED


def test_a_step_that_sees_something_else_ends_the_report(tmp_path: Path) -> None:
    text = edited(("    as: dma\n", "    as: dma\n    expect: {faults: 0}\n"))
    finding = finding_of(text, tmp_path)
    assert finding.word is Word.DIFFERENT
    assert finding.reason == "step 6 (copy gpu0): faults is 1, expected 0"
    assert len(finding.steps) == 6


def test_the_kernel_log_is_evidence(tmp_path: Path) -> None:
    text = edited(
        ("expect:\n", LOG_STEP),
        ("  when_fixed:", "    it is logged:\n      log: log\n      contains: DMAR\n  when_fixed:"),
    )
    finding = finding_of(text, tmp_path)
    assert finding.word is Word.REPRODUCED
    assert "kernel: DMAR: write" in map(str, finding.evidence)


def test_a_missing_capability_is_a_skip(tmp_path: Path) -> None:
    vfio = edited(("open: [gpu0, gpu1]", "open: [gpu0, gpu1]\n    domain: vfio"))
    finding = finding_of(vfio, tmp_path, overrides=Overrides(iommu_mode="off"))
    assert finding.word is Word.SKIP
    assert "IOMMU off" in finding.reason


def test_a_machine_that_dies_is_lost_with_its_console(tmp_path: Path) -> None:
    finding = finding_of(TEXT, tmp_path, knobs={"dies_on": "engine.copy"})
    assert finding.word is Word.LOST
    assert finding.console_tail == "Kernel panic"
    boot = finding_of(TEXT, tmp_path, knobs={"fails": LostError("no hello", node="host0")})
    assert boot.word is Word.LOST


def test_a_death_that_was_reported_is_reproduced(tmp_path: Path) -> None:
    start, rest = TEXT.split("  as_reported:\n")
    fixed = rest[rest.index("  when_fixed:") :]
    text = f'{start}  as_reported:\n    it panics:\n      lost: "Kernel panic"\n{fixed}'
    finding = finding_of(text, tmp_path, knobs={"dies_on": "engine.copy"})
    assert finding.word is Word.REPRODUCED
    assert finding_of(text.replace("Kernel panic", "BUG:"), tmp_path).word is Word.DIFFERENT
    other = text.replace("Kernel panic", "BUG:")
    assert finding_of(other, tmp_path, knobs={"dies_on": "engine.copy"}).word is Word.LOST


def test_the_testbeds_own_fault_is_an_error(tmp_path: Path) -> None:
    finding = finding_of(TEXT, tmp_path, knobs={"fails": ZeroDivisionError("oops")})
    assert finding.word is Word.ERROR
    assert finding.reason == "ZeroDivisionError: oops"
    assert "Traceback" in finding.details


@pytest.mark.parametrize("knobs", [{}, {"dies_on": "engine.copy"}, {"dies_on": "vfio.open"}])
def test_the_rack_ends_whatever_happens(tmp_path: Path, knobs: dict[str, str]) -> None:
    case = case_of()
    racks = source(case, tmp_path, **knobs)
    reproduce(case, racks)
    assert [rack.closed for rack in racks.racks] == [True]


def test_an_interrupt_goes_through_and_the_rack_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeNode, "do_engine_copy", interrupt)
    closed: list[str] = []
    monkeypatch.setattr(FakeRack, "close", lambda rack: closed.append(rack.name))
    case = case_of()
    with pytest.raises(KeyboardInterrupt):
        reproduce(case, source(case, tmp_path))
    assert closed == ["two"]


W = Word


@pytest.mark.parametrize(
    ("words", "expect", "code"),
    [
        ([W.FIXED], None, ExitCode.PASS),
        ([W.REPRODUCED], None, ExitCode.FAIL),
        ([W.DIFFERENT], None, ExitCode.SKIP),
        ([W.SKIP], None, ExitCode.SKIP),
        ([W.LOST], None, ExitCode.SKIP),
        ([W.ERROR], None, ExitCode.ERROR),
        ([W.FIXED, W.REPRODUCED, W.ERROR, W.SKIP], None, ExitCode.FAIL),
        ([W.FIXED, W.ERROR, W.SKIP], None, ExitCode.ERROR),
        ([W.FIXED, W.DIFFERENT], None, ExitCode.SKIP),
        ([W.REPRODUCED], W.REPRODUCED, ExitCode.PASS),
        ([W.FIXED], W.REPRODUCED, ExitCode.FAIL),
        ([W.DIFFERENT], W.REPRODUCED, ExitCode.FAIL),
        ([W.LOST], W.REPRODUCED, ExitCode.LOST),
        ([W.SKIP], W.FIXED, ExitCode.SKIP),
        ([W.ERROR], W.FIXED, ExitCode.ERROR),
        ([W.REPRODUCED], W.FIXED, ExitCode.FAIL),
    ],
)
def test_exit_codes_suit_a_bisection_or_a_check(
    words: list[Word], expect: Word | None, code: ExitCode
) -> None:
    assert exit_code(words, expect) is code


def test_only_the_wanted_word_passes() -> None:
    assert [verdict_of(word) for word in Word] == [
        Verdict.FAIL,
        Verdict.PASS,
        Verdict.FAIL,
        Verdict.SKIP,
        Verdict.LOST,
        Verdict.ERROR,
    ]


def test_a_run_leaves_a_record_and_the_report_itself(tmp_path: Path) -> None:
    case = dataclasses.replace(case_of(), content=TEXT.encode())
    findings, code = run_reports([case], tmp_path, source, expect=Word.REPRODUCED)
    assert code is ExitCode.PASS
    record = load_record(tmp_path / "record.json")
    (report,) = record.reports
    assert (report.word, report.expected, report.link) == (
        "REPRODUCED",
        "REPRODUCED",
        "https://example.org/1",
    )
    assert {c.name: c.holds for c in report.conditions} == {
        "it is refused": True,
        "nothing has arrived": True,
        "nothing is refused": False,
        "it has arrived": False,
    }
    assert report.steps[5].values["faults"] == 1
    assert record.outcomes[0].verdict is Verdict.PASS
    assert record.outcomes[0].evidence == findings[0].evidence
    assert (tmp_path / "report.yaml").read_text() == TEXT
    assert json.loads((tmp_path / "report.json").read_text())["vars"] == {"raw": True}
    assert (tmp_path / "junit.xml").exists()


def test_several_reports_have_folders_of_their_own(tmp_path: Path) -> None:
    _, code = run_reports([case_of(), case_of()], tmp_path, source)
    assert code is ExitCode.FAIL
    assert sorted(p.parent.name for p in tmp_path.glob("*/record.json")) == ["x", "x~2"]


def test_a_person_reads_what_held_and_why(tmp_path: Path) -> None:
    case = case_of()
    text = "\n".join(printing.lines(case, reproduce(case, source(case, tmp_path))))
    assert text.startswith("REPRODUCED x raw=True (")
    assert "  as reported:\n    yes it is refused\n        fault of 0000:01:00.1, write" in text
    assert "    no  nothing is refused\n" in text


def test_a_skip_in_mid_step_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise CapabilityMissing("a moon")

    monkeypatch.setattr(FakeNode, "do_vfio_open", missing)
    finding = finding_of(TEXT, tmp_path)
    assert (finding.word, finding.reason) == (Word.SKIP, "a moon")
