# SPDX-License-Identifier: Apache-2.0
"""Other people's KTAP: each way in which it can be right, wrong or cut off has its verdict."""

from __future__ import annotations

import io
import re
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.results.ktap import KtapStream
from testbed.results.ktap_reader import Ending, read_ktap
from testbed.results.verdicts import Outcome, Verdict, combine

PASS, FAIL, SKIP, LOST, ERROR = Verdict


def read(text: str, status: int | None = 0, reason: str = "") -> dict[str, Outcome]:
    found = read_ktap("p", dedent(text), Ending(status, reason))
    return {outcome.test: outcome for outcome in found}


def verdicts(text: str, status: int | None = 0) -> dict[str, Verdict]:
    return {name: outcome.verdict for name, outcome in read(text, status).items()}


def test_results_with_their_diagnostics() -> None:
    found = read(
        """\
        TAP version 13
        1..2
        # RUN           global.a ...
        ok 1 global.a
        # b.c:12:global.b:Expected 0 (0) == 1 (1)
        not ok 2 - global.b
        # Totals: pass:1 fail:1
        """,
        status=1,
    )
    assert {n: o.verdict for n, o in found.items()} == {"p/global.a": PASS, "p/global.b": FAIL}
    assert [str(e) for e in found["p/global.b"].evidence] == [
        "# b.c:12:global.b:Expected 0 (0) == 1 (1)",
        "not ok 2 - global.b",
    ]


@pytest.mark.parametrize(
    ("line", "verdict", "reason"),
    [
        ("ok 1 a # SKIP no device", SKIP, "no device"),
        ("not ok 1 a # SKIP", SKIP, "no reason given"),
        ("ok 1 a # skip: lower case", SKIP, "lower case"),
        ("ok 1 a # TODO soon", PASS, "TODO soon"),
        ("not ok 1 a # TODO soon", SKIP, "expected to fail: soon"),
        ("ok 1 a # XFAIL broken", SKIP, "expected to fail: broken"),
        ("not ok 1 a # TIMEOUT 30 seconds", LOST, "TIMEOUT 30 seconds"),
        ("not ok 1 a # LOST the machine", LOST, "LOST the machine"),
        ("not ok 1 a # ERROR bad", ERROR, "bad"),
        ("ok 1 a # ERROR bad", ERROR, "bad"),
        ("ok 1 a # rcode=0", PASS, "rcode=0"),
        ("not ok 1 a # exit=1", FAIL, "exit=1"),
        ("not ok", FAIL, "not ok"),
        ("not ok a", FAIL, "not ok"),
    ],
)
def test_directives(line: str, verdict: Verdict, reason: str) -> None:
    [outcome] = read(line, status=0).values()
    assert (outcome.verdict, outcome.reason) == (verdict, reason)


def test_a_directive_without_a_description_names_the_test_by_its_number() -> None:
    assert verdicts("1..1\nok 1 # SKIP no huge pages") == {"p/1": SKIP}


def test_a_parent_is_no_better_than_its_subtests() -> None:
    text = """\
        KTAP version 1
        1..2
          KTAP version 1
          1..2
          ok 1 one
            KTAP version 1
            1..1
            not ok 1 deep
          ok 2 two
        ok 1 parent
        ok 2 other
        """
    found = read(text)
    assert {n: o.verdict for n, o in found.items()} == {
        "p/parent/one": PASS,
        "p/parent/two/deep": FAIL,
        "p/parent/two": FAIL,
        "p/parent": FAIL,
        "p/other": PASS,
    }
    assert "two/deep" in found["p/parent"].reason


def test_subtests_that_never_came_are_lost_though_their_parent_says_ok() -> None:
    text = "1..1\n  # Subtest: x\n  1..2\n  ok 1 a\nok 1 parent\n"
    assert verdicts(text) == {"p/parent/a": PASS, "p/parent/plan": LOST, "p/parent": LOST}


@pytest.mark.parametrize(
    ("text", "status", "verdict", "reason"),
    [
        ("1..3\nok 1 a\n", 0, LOST, "1 results came, 3 were planned"),
        ("1..1\nok 1 a\nok 2 b\n", 0, ERROR, "2 results came, 1 were planned"),
        ("1..3\nok 1 a\n# then\n", 139, LOST, "killed by SIGSEGV after 1 of 3 tests"),
        ("ok 1 a\n", 134, LOST, "killed by SIGABRT after 1 tests"),
        ("1..3\nok 1 a\n", 1, FAIL, "exit status 1: ok 1 a"),
        ("1..2\nok 1 a\nBail out! no memory\n", 1, FAIL, "it gave up: no memory"),
        ("1..2\nok 1 a\nBail out! no memory\n", 4, SKIP, "it gave up: no memory"),
        ("1..2\nok 1 a\nBail out!\n", 0, ERROR, "it gave up: no reason given"),
        ("KTAP version 1\n1..0 # SKIP no device\n", 0, SKIP, "no device"),
        ("1..0 # SKIP no device\n", 4, SKIP, "no device"),
        ("Unable to determine which device\n", 4, SKIP, "skip: Unable to determine which device"),
        ("TAP version 13\n", 0, ERROR, "it announced tests and gave no result"),
        ("1..2\n", 0, ERROR, "it announced tests and gave no result"),
        ("sh: x: not found\n", 127, ERROR, "it could not be started: sh: x: not found"),
        ("hello\n", 0, PASS, "exit status 0; it says nothing in KTAP"),
        ("hello\n", 1, FAIL, "exit status 1: hello"),
        ("ok 1 a\n", 1, FAIL, "exit status 1: ok 1 a"),
        ("\x00\xff\x1b[2J\n", 2, SKIP, "expected to fail: \xff [2J"),
    ],
)
def test_what_is_said_of_the_program_itself(
    text: str, status: int, verdict: Verdict, reason: str
) -> None:
    outcome = read_ktap("p", text, Ending(status))[-1]
    assert (outcome.test, outcome.verdict, outcome.reason) == ("p", verdict, reason)


def test_a_status_that_a_result_explains_is_not_said_twice() -> None:
    assert verdicts("1..1\nnot ok 1 a\n", status=1) == {"p/a": FAIL}
    assert verdicts("1..1\nok 1 a # SKIP x\n", status=4) == {"p/a": SKIP}


def test_what_hangs_is_lost_with_its_last_lines() -> None:
    found = read("1..2\nok 1 a\n# waiting\n", None, "it did not end within 5 s")
    assert found["p/a"].verdict is PASS
    assert found["p"].verdict is LOST
    assert found["p"].reason == "it did not end within 5 s after 1 of 2 tests"
    assert str(found["p"].evidence[-1]) == "# waiting"


def test_our_own_output_is_read_as_it_was_meant() -> None:
    ends = [Outcome((), verdict.lower(), verdict, "why") for verdict in Verdict]
    stream = io.StringIO()
    ktap = KtapStream(stream)
    ktap.plan(2)
    ktap.parts("several", ends)
    ktap.outcome(Outcome((), "one", PASS))
    found = read(stream.getvalue())
    assert {n: o.verdict for n, o in found.items() if "/several/" in n} == {
        f"p/several/{verdict.lower()}": verdict for verdict in Verdict
    }
    assert (found["p/several"].verdict, found["p/one"].verdict) == (FAIL, PASS)


LINES = st.one_of(
    st.builds(
        "{}{}{}{}{}".format,
        st.sampled_from(["", "  ", "    ", "\t", " " * 90]),
        st.sampled_from(["ok", "not ok", "ok 1", "not ok 2", "not ok 99999999999", "1..2", "1..0"]),
        st.sampled_from(["", " a", " - b"]),
        st.sampled_from(["", " # SKIP", " # TODO x", " # ERROR", " # TIMEOUT", " # what"]),
        st.sampled_from(["", "\r", "\x00"]),
    ),
    st.sampled_from(["KTAP version 1", "  TAP version 13", "Bail out! x", "# Subtest: y", "#"]),
    st.text(max_size=30),
)
STATUSES = st.one_of(st.none(), st.integers(-1, 300))


@given(st.text(max_size=400), STATUSES)
def test_any_text_is_read(text: str, status: int | None) -> None:
    assert read_ktap("p", text, Ending(status)) or status == 0


@given(st.lists(LINES, max_size=25), STATUSES)
def test_no_refusal_becomes_a_pass(lines: list[str], status: int | None) -> None:
    text = "\n".join(lines)
    found = read_ktap("p", text, Ending(status))
    assert found
    refused = sum(bool(re.match(r"\s*not ok(\s|$)", line)) for line in text.splitlines())
    assert sum(outcome.verdict is not PASS for outcome in found) >= refused
    accepted = sum(bool(re.match(r"\s*ok\s", line)) for line in text.splitlines())
    assert sum(outcome.verdict is PASS for outcome in found) <= max(accepted, 1)
    if status is None or status not in (0, 2, 4):
        assert combine(o.verdict for o in found) is not PASS


@given(st.lists(st.sampled_from(["ok", "not ok"]), min_size=1, max_size=12), st.integers(0, 11))
def test_cutting_a_program_off_loses_its_pass(results: list[str], kept: int) -> None:
    whole = [f"{word} {number} t{number}" for number, word in enumerate(results, 1)]
    shown = whole[:kept]
    text = "\n".join(["KTAP version 1", f"1..{len(whole)}", *shown])
    found = [o.verdict for o in read_ktap("p", text, Ending(0))]
    clean = len(shown) == len(whole) and "not ok" not in results
    assert (combine(found) is PASS) == clean
