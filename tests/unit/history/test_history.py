# SPDX-License-Identifier: Apache-2.0
"""The store of earlier runs: bounded, shared, never a traceback; and what it comes to."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.cli import main
from testbed.history import kcidb, store
from testbed.history.model import Remembered
from testbed.history.trend import Trend, histories
from testbed.results.verdicts import Outcome, Verdict
from tests.unit.page.run_folder import report_record, run_record, write_run


def outcome(verdict: Verdict, name: str = "A-1") -> Outcome:
    return Outcome((name,), f"test_{name}", verdict, f"{verdict}: \ud800 why", duration_s=0.1)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / store.FILE_NAME


def keep(
    file: Path, number: int, *outcomes: Outcome, kernel: str = "7.2", mutation: str = ""
) -> None:
    started = f"2026-07-{1 + number // 24:02}T{number % 24:02}:00:00+00:00"
    made = run_record(outcomes, started=started, kernel=kernel, mutation=mutation)
    store.add(file, made, Path(f"/runs/{number}"), lambda _: None)


def trends(file: Path, **asked: object) -> dict[str, Trend]:
    found = store.read(file, print, **asked)  # type: ignore[arg-type]
    return {each.name: each.trend for each in histories(found)}


PASS, FAIL, SKIP = Verdict.PASS, Verdict.FAIL, Verdict.SKIP


@pytest.mark.parametrize(
    ("verdicts", "trend"),
    [
        ([(PASS, "a"), (PASS, "a")], Trend.STEADY),
        ([(FAIL, "a"), (FAIL, "b")], Trend.FAILING),
        ([(PASS, "a"), (FAIL, "b")], Trend.BROKEN),
        ([(FAIL, "a"), (PASS, "b")], Trend.FIXED),
        ([(FAIL, "a"), (SKIP, "b"), (PASS, "b")], Trend.FIXED),
        ([(PASS, "a"), (FAIL, "a")], Trend.BROKEN),
        ([(PASS, "a"), (FAIL, "a"), (PASS, "a")], Trend.FLAKY),
        ([(PASS, "a"), (FAIL, "b"), (PASS, "c")], Trend.FIXED),
        ([(SKIP, "a"), (SKIP, "a")], Trend.UNSHOWN),
    ],
)
def test_a_history_has_one_word(
    file: Path, verdicts: list[tuple[Verdict, str]], trend: Trend
) -> None:
    for number, (verdict, kernel) in enumerate(verdicts):
        keep(file, number, outcome(verdict), kernel=kernel)
    assert trends(file) == {"A-1": trend}


def test_what_only_the_newest_run_has_is_new(file: Path) -> None:
    keep(file, 1, outcome(PASS))
    keep(file, 2, outcome(PASS), outcome(PASS, "B-1"))
    assert trends(file) == {"A-1": Trend.STEADY, "B-1": Trend.NEW}


def test_a_deliberate_break_is_no_history(file: Path) -> None:
    keep(file, 1, outcome(PASS))
    keep(file, 2, outcome(FAIL), mutation="skip-unmap")
    assert trends(file) == {"A-1": Trend.STEADY}
    found = store.read(file, print, broken=True)
    assert [each.result.verdict for each in found] == ["PASS", "FAIL"]
    assert trends(file, broken=True) == {"A-1": Trend.STEADY}


def test_runs_are_chosen_by_kernel_rack_and_number(file: Path) -> None:
    for number in range(6):
        keep(file, number, outcome(PASS), kernel=f"7.{number % 2}")
    assert len(store.read(file, print, kernel="7.1")) == 3
    assert len(store.read(file, print, topology="quad-gpu")) == 6
    assert not store.read(file, print, topology="other")
    newest = store.read(file, print, runs=2)
    assert [each.run.folder for each in newest] == ["/runs/4", "/runs/5"]


def test_a_run_is_kept_once(file: Path) -> None:
    keep(file, 1, outcome(PASS))
    keep(file, 1, outcome(PASS))
    assert len(store.read(file, print)) == 1


def test_the_store_is_bounded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_RUNS", 3)
    for number in range(7):
        keep(file, number, outcome(PASS))
    assert [each.run.folder for each in store.read(file, print)] == [
        f"/runs/{n}" for n in (4, 5, 6)
    ]
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT count(*) FROM results").fetchone() == (3,)
    database.close()


@pytest.mark.parametrize("damage", ["text", "header", "middle", "empty tables"])
def test_a_corrupt_store_is_told_and_moved_aside(file: Path, said: list[str], damage: str) -> None:
    for number in range(40):
        keep(file, number, *(outcome(PASS, f"R-{n}") for n in range(30)))
    content = bytearray(file.read_bytes())
    match damage:
        case "text":
            content = bytearray(b"no database at all\n" * 500)
        case "header":
            content[0:16] = b"x" * 16
        case "middle":
            content[4096 : len(content) // 2] = b"\xaa" * (len(content) // 2 - 4096)
        case _:
            file.unlink()
            database = sqlite3.connect(file)
            database.execute(f"PRAGMA user_version = {store.VERSION}")
            database.close()
            content = bytearray(file.read_bytes())
    file.write_bytes(content)
    run = write_run(file.parent / "run")
    store.remember(run, said.append, file)
    if damage == "empty tables":
        assert "no such table" in said[0]
        return
    assert len(said) == 1
    assert "was corrupt: it is moved to" in said[0]
    assert [each.name for each in file.parent.glob("*.broken-*") if "-wal" not in each.name]
    assert {each.run.folder for each in store.read(file, print)} == {str(run)}


def test_a_newer_testbeds_store_is_left_alone(file: Path, said: list[str]) -> None:
    keep(file, 1, outcome(PASS))
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    before = file.read_bytes()
    store.remember(write_run(file.parent / "run"), said.append, file)
    assert "a newer testbed's" in said[0]
    assert file.read_bytes() == before
    with pytest.raises(store.Unusable):
        store.read(file, print)


def test_a_store_that_cannot_be_written_is_said_and_nothing_more(
    tmp_path: Path, said: list[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    run = write_run(tmp_path / "run")
    store.remember(run, said.append, tmp_path / "file" / "history.sqlite3")
    assert len(said) == 1
    assert said[0].startswith("this run is not in the history:")


def _write(file: Path, worker: int, count: int) -> None:
    for number in range(count):
        made = run_record([outcome(PASS)], started=f"2026-07-01T00:00:{number:02}+00:00")
        store.add(file, made, Path(f"/runs/{worker}/{number}"), lambda _: None)


def test_runs_that_end_at_once_are_all_kept(file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(file, worker, 12)) for worker in range(4)]
    for worker in workers:
        worker.start()
    deadline_s = time.monotonic() + 60
    for worker in workers:
        worker.join(max(0.1, deadline_s - time.monotonic()))
        assert worker.exitcode == 0
    assert len(store.read(file, print)) == 48


def test_reports_of_one_command_are_kept_each_by_its_word(file: Path, said: list[str]) -> None:
    for word in ("REPRODUCED", "FIXED"):
        verdict = PASS if word == "FIXED" else FAIL
        made = run_record(
            [Outcome((), f"bug-{word}", verdict, word)], reports=[report_record(word)]
        )
        write_run(file.parent / "runs" / word, made)
    store.remember(file.parent / "runs", said.append, file)
    assert not said
    found = {each.result.name: each.result.verdict for each in store.read(file, print)}
    assert found == {"bug-FIXED": "FIXED", "bug-REPRODUCED": "REPRODUCED"}


def remembered(file: Path) -> list[Remembered]:
    keep(file, 1, outcome(PASS), outcome(Verdict.LOST, "B 2/ü"), outcome(Verdict.ERROR, "C-3"))
    keep(file, 2, outcome(FAIL), outcome(SKIP, "B 2/ü"), kernel="7.3")
    return store.read(file, print)


def test_the_export_is_valid_kcidb(file: Path) -> None:
    schema = pytest.importorskip("kcidb_io").schema
    document = kcidb.document(remembered(file), "testbed")
    version = getattr(schema, f"V{kcidb.MAJOR}_{kcidb.MINOR}")
    version.validate(document)
    assert [each["status"] for each in document["tests"]] == [
        "PASS",
        "ERROR",
        "MISS",
        "FAIL",
        "SKIP",
    ]
    assert len(document["builds"]) == len(document["checkouts"]) == 2
    document["tests"][0]["status"] = "GOOD"
    with pytest.raises(Exception, match="GOOD"):
        version.validate(document)


def verb(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["history", *words])
    return int(str(ended.value.code))


def test_the_verb_tells_lists_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TESTBED_STATE_DIR", str(tmp_path))
    assert verb() == 0
    assert "no run that fits is remembered" in capsys.readouterr().out
    file = tmp_path / store.FILE_NAME
    keep(file, 1, outcome(PASS, "MAP-02"))
    keep(file, 2, replace(outcome(FAIL, "MAP-02"), reason="x\x1b[2Jy"), kernel="8.0")
    assert verb() == 0
    assert verb("MAP-02") == 0
    text = capsys.readouterr().out
    assert "MAP-02  broken" in text
    assert "8.0" in text
    assert "\x1b" not in text
    assert verb("MAP-2") == 2
    assert "did you mean 'MAP-02'?" in capsys.readouterr().err
    assert verb("--origin", "Not Mine") == 2
    capsys.readouterr()
    assert verb("MAP-02", "--format", "json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["requirements"][0]["trend"] == "broken"
    assert len(said["requirements"][0]["runs"]) == 2
    assert verb("--format", "kcidb") == 0
    assert len(json.loads(capsys.readouterr().out)["tests"]) == 2
    file.write_bytes(b"rubbish" * 1000)
    assert verb() == 0
    assert "was corrupt: it is moved to" in capsys.readouterr().err
