# SPDX-License-Identifier: Apache-2.0
"""`testbed matrix` on this machine: the table, what a kill leaves, what runs again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.contract import matrix_runs as runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TEXT = """\
matrix: some
topologies: [minimal, quad-gpu gpus=2]
iommus: [intel strict, amd strict]
suites: [./test_quick.py, ./test_wrong.py, empty]
exclude:
  - {iommu: amd*, suite: "./test_*"}
  - {topology: quad*, suite: "*wrong*", reason: nobody has one}
"""


def test_one_table_with_a_reason_for_whatever_did_not_run(tmp_path: Path) -> None:
    file = runs.write(tmp_path, TEXT, quick=runs.QUICK, wrong=runs.WRONG)
    out = tmp_path / "run"
    code, text, errors = runs.run(tmp_path, file, "--output", out)
    assert code == 1, errors
    assert list(runs.verdicts(out).values()) == [
        *("PASS", "FAIL", "SKIP", "SKIP"),
        *("PASS", "SKIP", "SKIP", "SKIP"),
    ]
    assert "one is not two" in text
    assert "nobody has one" in text
    suites = ElementTree.parse(out / "junit.xml").getroot()  # noqa: S314  ours
    assert [suite.get("failures") for suite in suites] == ["0", "1", *["0"] * 6]
    page = (out / "index.html").read_text()
    assert "one is not two" in page
    assert "<script" not in page
    logs = runs.record(out)["cells"][1]["folder"]
    assert (out / logs / "run" / "record.json").exists()
    assert f'href="{logs}/run/page.html"' in page
    assert "one is not two" in (out / logs / "run" / "page.html").read_text()
    assert runs.remembered(tmp_path) == {
        out / cell["folder"] / "run" for cell in runs.record(out)["cells"] if cell["counts"]
    }


def test_what_ended_before_a_kill_is_not_run_again(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_quick.py, ./test_gated.py]\n"
    file = runs.write(tmp_path, text, quick=runs.QUICK, gated=runs.gated(tmp_path))
    out = tmp_path / "run"
    with runs.running(tmp_path, file, "-j", "1", "--output", out) as process:
        runs.await_that("the second cell runs", lambda: runs.waiting(tmp_path))
        children = runs.pids(process)
        assert children
        os.kill(process.pid, signal.SIGKILL)
        runs.await_that("its children end too", lambda: not any(map(runs.alive, children)))
    first = (out / "cells" / "1-minimal-test_quick.py" / "cell.json").read_bytes()
    (tmp_path / "go").touch()
    code, _, errors = runs.run(tmp_path, file, "--resume", out)
    assert code == 0, errors
    assert "1 cells had ended; 1 are to run" in errors
    assert list(runs.verdicts(out).values()) == ["PASS", "PASS"]
    assert (out / "cells" / "1-minimal-test_quick.py" / "cell.json").read_bytes() == first
    assert runs.record(out)["cells"][1]["folder"].endswith("/2")


def test_a_file_that_changed_runs_again(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_quick.py]\n"
    file = runs.write(tmp_path, text, quick=runs.QUICK)
    out = tmp_path / "run"
    assert runs.run(tmp_path, file, "--output", out)[0] == 0
    runs.write(tmp_path, text, quick=runs.WRONG)
    assert runs.run(tmp_path, file, "--resume", out)[0] == 1
    assert list(runs.verdicts(out).values()) == ["FAIL"]


def test_only_what_failed_runs_again(tmp_path: Path) -> None:
    switch = tmp_path / "good"
    again = f"import pathlib\ndef test_it():\n    assert pathlib.Path({str(switch)!r}).exists()\n"
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_quick.py, ./test_again.py]\n"
    file = runs.write(tmp_path, text, quick=runs.QUICK, again=again)
    out = tmp_path / "state" / "matrices" / "one"
    assert runs.run(tmp_path, file, "--output", out)[0] == 1
    switch.touch()
    (tmp_path / "other").mkdir()
    text = text.replace("matrix: m", "matrix: other")
    other = runs.write(tmp_path / "other", text, quick=runs.QUICK, again=again)
    code, _, errors = runs.run(tmp_path, other, "--only-failed")
    assert (code, "no run of the matrix 'other'" in errors) == (2, True), errors
    code, _, errors = runs.run(tmp_path, file, "--resume", "last")
    assert code == 1, "a FAIL is never tried again by itself"
    code, _, errors = runs.run(tmp_path, file, "--only-failed")
    assert code == 0, errors
    assert "1 are to run" in errors
    assert [cell["folder"][-1] for cell in runs.record(out)["cells"]] == ["1", "2"]


def test_interrupted_it_ends_all_and_says_so(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_gated.py]\nrepeat: 3\n"
    file = runs.write(tmp_path, text, gated=runs.gated(tmp_path))
    out = tmp_path / "run"
    with runs.running(tmp_path, file, "-j", "1", "--output", out) as process:
        runs.await_that("a cell runs", lambda: runs.waiting(tmp_path))
        children = runs.pids(process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=runs.DEADLINE_S)
        assert process.returncode == 130
        assert not any(map(runs.alive, children))
    assert "INTERRUPTED" in errors
    assert "3 of 3 not run" in errors
    assert f"--resume {out}" in errors
    assert runs.record(out)["exit_code"] == 130


def test_a_cell_that_does_not_end_is_ended(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_gated.py]\ndeadline_s: 5\n"
    file = runs.write(tmp_path, text, gated=runs.gated(tmp_path))
    out = tmp_path / "run"
    code, text, _ = runs.run(tmp_path, file, "--output", out)
    assert code == 128
    assert "did not end within 5 s" in text
    assert not runs.runners(out)


def test_two_cannot_work_in_one_folder(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\nsuites: [./test_gated.py]\n"
    file = runs.write(tmp_path, text, gated=runs.gated(tmp_path))
    out = tmp_path / "run"
    with runs.running(tmp_path, file, "--output", out):
        runs.await_that("a cell runs", lambda: runs.waiting(tmp_path))
        code, _, errors = runs.run(tmp_path, file, "--resume", out)
    assert code == 2
    assert "another testbed works on" in errors
