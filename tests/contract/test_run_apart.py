# SPDX-License-Identifier: Apache-2.0
"""`testbed run -j`: the same as one after the other, and nothing is left of what is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from testbed.errors import InputError
from testbed.verbs.apart import words_of
from testbed.verbs.run import run as verb
from tests.contract import matrix_runs as runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# The first part ends last.
LATE = "import time\ndef test_late():\n    time.sleep(3)\n"

# The rack is looked at, and not booted.
BY_ENGINE = """\
import pytest
from testbed.harness.session import SESSION

@pytest.mark.requirement("MAP-99")
def test_it(request):
    assert "engine='edu'" not in repr(request.config.stash[SESSION].pool.source.topology)
"""


def start(*words: str | Path) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "testbed.cli", "run", *map(str, words)]
    return subprocess.Popen(
        program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(*words: str | Path) -> tuple[int, str, str]:
    process = start(*words)
    out, err = process.communicate(timeout=runs.DEADLINE_S)
    return process.returncode, out, err


def test_the_order_is_the_command_lines_however_many_at_once(tmp_path: Path) -> None:
    suites = [tmp_path / "test_late.py", tmp_path / "test_wrong.py"]
    for suite, text in zip(suites, (LATE, runs.WRONG), strict=True):
        suite.write_text(text)
    said, written = [], []
    for jobs in ("1", "2"):
        out = tmp_path / f"j{jobs}"
        words = (*suites, "-t", "minimal", "-t", "quad-gpu", "-j", jobs, "--output", out)
        code, ktap, errors = run(*words)
        assert code == 1, errors
        said.append(ktap)
        record = json.loads((out / "record.json").read_text())
        written.append([(o["test"], o["verdict"], o["reason"]) for o in record["outcomes"]])
    assert said[0] == said[1]
    assert written[0] == written[1]
    assert written[0] == [
        ("minimal-test_late.py/late", "PASS", ""),
        ("minimal-test_wrong.py/wrong", "FAIL", "one is not two"),
        ("quad-gpu-test_late.py/late", "PASS", ""),
        ("quad-gpu-test_wrong.py/wrong", "FAIL", "one is not two"),
    ]
    assert "1..4" in said[0]
    assert {label: each["rack"] for label, each in record["topologies"].items()} == {
        "minimal-test_late.py": "minimal",
        "minimal-test_wrong.py": "minimal",
        "quad-gpu-test_late.py": "quad-gpu",
        "quad-gpu-test_wrong.py": "quad-gpu",
    }
    assert record["topology"] == {}


def test_each_part_is_a_run_of_its_own_in_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_STATE_DIR", str(tmp_path / "state"))
    suite = tmp_path / "test_quick.py"
    suite.write_text(runs.QUICK)
    words = (suite, "-t", "minimal", "-t", "quad-gpu", "-j", "2")
    assert run(*words, "--no-history", "--output", tmp_path / "unseen")[0] == 0
    assert run(*words, "--output", tmp_path / "out")[0] == 0
    assert runs.remembered(tmp_path) == {
        tmp_path / "out" / f"{rack}-test_quick.py" for rack in ("minimal", "quad-gpu")
    }


def test_engines_are_compared_when_all_have_ended(tmp_path: Path) -> None:
    suite = tmp_path / "test_by_engine.py"
    suite.write_text(BY_ENGINE)
    out = tmp_path / "out"
    code, ktap, errors = run(suite, "-t", "minimal", "--engine", "all", "-j", "2", "--output", out)
    assert code == 1, errors
    ends = json.loads((out / "record.json").read_text())["outcomes"]
    group = "minimal-test_by_engine.py"
    assert [(end["test"], end["verdict"]) for end in ends] == [
        (f"{group}-model/it", "PASS"),
        (f"{group}-igb/it", "PASS"),
        (f"{group}-edu/it", "FAIL"),
        (f"{group}/engines_agree", "FAIL"),
    ]
    assert "MAP-99 (PASS by model, PASS by igb, FAIL by edu)" in ends[-1]["reason"]
    assert "1..4" in ktap


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_nothing_is_left(tmp_path: Path, number: signal.Signals) -> None:
    suite = tmp_path / "test_gated.py"
    suite.write_text(runs.gated(tmp_path))
    process = start(suite, "-t", "minimal", "-t", "quad-gpu", "-j", "2", "--output", tmp_path / "o")
    runs.await_that("both run", lambda: runs.waiting(tmp_path) == 2)
    os.kill(process.pid, number)
    ktap, _ = process.communicate(timeout=runs.DEADLINE_S)
    runs.await_that("nothing is left", lambda: not runs.runners(tmp_path), 30)
    if number is signal.SIGINT:
        assert process.returncode == 130
        assert "2 of 2 tests not run" in ktap
        assert json.loads((tmp_path / "o" / "record.json").read_text())["exit_code"] == 130


def test_an_option_that_came_from_the_environment_reaches_the_parts(tmp_path: Path) -> None:
    suite = tmp_path / "test_two.py"
    suite.write_text("def test_first(): pass\ndef test_second(): pass\n")
    process = subprocess.run(
        [sys.executable, "-m", "testbed.cli", "run", str(suite), "--output", str(tmp_path / "o")],
        env={**os.environ, "TESTBED_RUN_JOBS": "2", "TESTBED_RUN_K": "second"},
        capture_output=True,
        text=True,
        timeout=runs.DEADLINE_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "ok 1 second" in process.stdout
    assert "first" not in process.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-j", "2", "--rack", "x"], "--rack uses a rack as it is"),
        (["-j", "2", "p2p-iomu"], "did you mean 'p2p-iommu'?"),
        (["-j", "2", "-t", "quad-gpu", "-t", "quad-gpux"], "did you mean 'quad-gpu'?"),
        (["-t", "minimal", "-t", "quad-gpu", "-s", "nothing=1"], "no variable 'nothing'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(words: list[str], said: str) -> None:
    result = CliRunner().invoke(verb, words)
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)


def test_options_are_said_again_word_for_word() -> None:
    words = [
        "x",
        "-t",
        "a",
        "-t",
        "b",
        "-s",
        "n=1",
        "-s",
        "m=2",
        "--warm",
        "-k",
        "one two",
        "-j",
        "3",
    ]
    context = verb.make_context("run", words)
    said = " ".join(words_of(context))
    assert said == "-k one two --set n=1 --set m=2 --warm --break none"
    again = verb.make_context("run", ["x", *words_of(context)])
    changed = {name for name, value in again.params.items() if value != context.params[name]}
    assert changed == {"topologies", "jobs"}
