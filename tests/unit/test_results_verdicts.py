# SPDX-License-Identifier: Apache-2.0
"""How outcomes combine, and how observations are judged."""

from __future__ import annotations

from dataclasses import replace

import pytest

from testbed.errors import ExitCode
from testbed.results.evidence import Access, FaultSeen, NoFaultSeen, Witness
from testbed.results.judging import (
    FaultWindow,
    Judgement,
    all_of,
    judge_bytes,
    judge_fault,
    judge_no_fault,
    judge_storm,
)
from testbed.results.verdicts import Outcome, Verdict, by_requirement, combine, exit_code

PASS, FAIL, SKIP, LOST, ERROR = Verdict
DEVICE, ADDRESS = "0000:05:00.1", 0xF4000000
READ_FAULT = FaultSeen(DEVICE, ADDRESS, Access.READ, 6, Witness.GUEST)


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [
        ([PASS, SKIP], PASS),
        ([SKIP, SKIP], SKIP),
        ([PASS, ERROR, SKIP], ERROR),
        ([ERROR, LOST, PASS], LOST),
        ([PASS, LOST, FAIL, ERROR], FAIL),
    ],
)
def test_the_worst_verdict_wins(verdicts: list[Verdict], worst: Verdict) -> None:
    assert combine(verdicts) is worst
    assert combine(reversed(verdicts)) is worst


def test_nothing_combines_to_nothing() -> None:
    with pytest.raises(ValueError, match="no verdict"):
        combine([])


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([PASS], 0),
        ([PASS, SKIP], 0),
        ([PASS, FAIL], 1),
        ([FAIL, LOST], 1),
        ([PASS, LOST, ERROR], 3),
        ([PASS, ERROR], 128),
        ([SKIP], 125),
        ([], 2),
    ],
)
def test_exit_codes_are_what_bisect_needs(verdicts: list[Verdict], code: int) -> None:
    assert exit_code(Outcome((), "t", verdict) for verdict in verdicts) is ExitCode(code)


def test_requirements_gather_their_tests() -> None:
    outcomes = [
        Outcome(("MAP-02",), "a", PASS, "fine"),
        Outcome(("MAP-02", "MAP-01"), "b", LOST, "gone"),
        Outcome(("MAP-02",), "c", LOST, "gone too"),
        Outcome((), "own", FAIL, "no requirement"),
    ]
    first, second = by_requirement(outcomes)
    assert (first.requirement, first.verdict, first.reason) == ("MAP-01", LOST, "gone")
    assert (second.requirement, second.verdict, second.reason) == ("MAP-02", LOST, "gone")
    assert second.tests == {PASS: 1, LOST: 2}


class TestBytes:
    def test_both_witnesses_agree(self) -> None:
        judgement = judge_bytes("gpu1.vram+0x0", 64, "aa", guest="aa", host="aa")
        assert judgement.holds
        assert [e.witness for e in judgement.evidence] == [Witness.GUEST, Witness.HOST]  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("guest", "host", "reason"),
        [
            ("bb", "bb", "does not hold the expected"),
            ("aa", "bb", "guest and host read different"),
            ("bb", "aa", "guest and host read different"),
            ("bb", None, "does not hold the expected"),
        ],
    )
    def test_any_difference_refutes(self, guest: str, host: str | None, reason: str) -> None:
        judgement = judge_bytes("p", 64, "aa", guest=guest, host=host)
        assert not judgement.holds
        assert reason in judgement.reason

    def test_without_a_host_view_the_guest_alone_is_named(self) -> None:
        judgement = judge_bytes("ram", 64, "aa", guest="aa", host=None)
        assert judgement.holds
        assert len(judgement.evidence) == 1


def fault_of(window: FaultWindow, **changes: object) -> Judgement:
    wanted = {
        "requester": DEVICE,
        "address": ADDRESS + 0x10,
        "access": Access.READ,
        "reasons": {5, 6},
        **changes,
    }
    return judge_fault(window, **wanted)  # type: ignore[arg-type]


class TestFault:
    def test_seen_by_one_or_both(self) -> None:
        exact = FaultSeen(DEVICE, ADDRESS + 0x10, Access.READ, 6, Witness.MACHINE)
        assert fault_of(FaultWindow((READ_FAULT,))).holds
        assert fault_of(FaultWindow((exact,), machine_watched=True)).holds
        both = fault_of(FaultWindow((READ_FAULT, exact), machine_watched=True))
        assert both.holds
        assert "guest and machine" in both.reason

    @pytest.mark.parametrize(
        "changes",
        [
            {"requester": "0000:06:00.1"},
            {"address": ADDRESS + 0x1000},
            {"address": ADDRESS - 1},
            {"access": Access.WRITE},
            {"reasons": {4}},
        ],
    )
    def test_another_fault_is_not_this_one(self, changes: dict[str, object]) -> None:
        judgement = fault_of(FaultWindow((READ_FAULT,)), **changes)
        assert not judgement.holds
        assert "saw 0000:05:00.1 read 0xf4000000" in judgement.reason

    def test_a_stranger_beside_the_right_one_refutes(self) -> None:
        stranger = FaultSeen(DEVICE, 0x1000, Access.WRITE, 5, Witness.MACHINE)
        assert not fault_of(FaultWindow((READ_FAULT, stranger), machine_watched=True)).holds

    def test_none(self) -> None:
        judgement = fault_of(FaultWindow(machine_watched=True))
        assert not judgement.holds
        assert judgement.evidence == (NoFaultSeen((Witness.GUEST, Witness.MACHINE)),)

    def test_a_range_of_pages(self) -> None:
        next_page = FaultSeen(DEVICE, ADDRESS + 0x1000, Access.READ, 6, Witness.GUEST)
        window = FaultWindow((READ_FAULT, next_page))
        assert not fault_of(window, size_bytes=0x100).holds
        assert fault_of(window, size_bytes=0x1000).holds


class TestNoFault:
    def test_silence_of_a_complete_log(self) -> None:
        assert judge_no_fault(FaultWindow()).holds
        assert judge_no_fault(FaultWindow(machine_watched=True, suppressed=9)).holds

    @pytest.mark.parametrize(
        "window",
        [
            FaultWindow(suppressed=1),
            FaultWindow(overflow=True),
            FaultWindow(lost_lines=3),
            FaultWindow((READ_FAULT,), machine_watched=True),
        ],
    )
    def test_gaps_and_faults_refute(self, window: FaultWindow) -> None:
        assert not judge_no_fault(window).holds


class TestStorm:
    PAGES = tuple(
        FaultSeen(DEVICE, ADDRESS + page * 4096, Access.WRITE, 5, Witness.MACHINE)
        for page in range(4)
    )

    def judge(self, window: FaultWindow) -> Judgement:
        return judge_storm(
            window,
            requester=DEVICE,
            address=ADDRESS,
            access=Access.WRITE,
            reasons={5},
            count=4,
        )

    def test_what_is_lost_is_counted(self) -> None:
        guest = FaultSeen(DEVICE, ADDRESS, Access.WRITE, 5, Witness.GUEST)
        judgement = self.judge(FaultWindow((guest, *self.PAGES), machine_watched=True))
        assert judgement.holds
        assert judgement.reason == "3 of 4 faults were lost and counted"
        assert "faults lost to the guest: 3 faults" in map(str, judgement.evidence)

    @pytest.mark.parametrize(
        ("window", "reason"),
        [
            (FaultWindow(PAGES[:3], machine_watched=True), "the machine saw 3"),
            (FaultWindow(machine_watched=True), "there was none"),
            (FaultWindow((*PAGES[:3], READ_FAULT), machine_watched=True), "saw 0000:05:00.1 read"),
            (
                FaultWindow(tuple(replace(p, witness=Witness.GUEST) for p in PAGES)),
                "all 4 faults were recorded",
            ),
            (
                FaultWindow(tuple(replace(p, witness=Witness.GUEST) for p in PAGES[:2])),
                "2 faults were lost, and nobody says so",
            ),
        ],
    )
    def test_a_wrong_count_or_a_silent_loss_refutes(self, window: FaultWindow, reason: str) -> None:
        judgement = self.judge(window)
        assert not judgement.holds
        assert reason in judgement.reason

    def test_without_a_second_witness_an_announced_loss_will_do(self) -> None:
        guest = tuple(replace(p, witness=Witness.GUEST) for p in self.PAGES[:1])
        assert self.judge(FaultWindow(guest, suppressed=9)).holds
        assert self.judge(FaultWindow(guest, overflow=True)).holds


def test_what_the_guest_did_not_record_is_counted() -> None:
    exact = FaultSeen(DEVICE, ADDRESS, Access.READ, 6, Witness.MACHINE)
    window = FaultWindow((READ_FAULT, exact, exact, exact), machine_watched=True)
    assert (window.count, window.unrecorded) == (3, 2)
    assert (FaultWindow((READ_FAULT,)).count, FaultWindow((READ_FAULT,)).unrecorded) == (1, 0)


def test_all_of_gives_the_first_reason_against_and_all_evidence() -> None:
    good = judge_bytes("a", 1, "x", guest="x", host="x")
    bad = judge_bytes("b", 1, "x", guest="y", host="y")
    worse = judge_no_fault(FaultWindow((READ_FAULT,)))
    together = all_of(good, bad, worse)
    assert not together.holds
    assert together.reason == bad.reason
    assert together.evidence == good.evidence + bad.evidence + worse.evidence
    assert all_of(good, judge_no_fault(FaultWindow())).holds
