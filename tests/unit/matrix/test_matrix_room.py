# SPDX-License-Identifier: Apache-2.0
"""What fits at once, what a cluster lacks, and how ends combine."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.errors import ExitCode, HostError
from testbed.matrix.display import shown
from testbed.matrix.needs import Need, Room, Worker, missing, needed
from testbed.matrix.pool import Pool
from testbed.matrix.records import CellRecord, exit_code
from testbed.matrix.table import word
from testbed.matrix.worker import LEFT_BEHIND, pack, unpack, work
from testbed.results.verdicts import Verdict

GIB = 1 << 30


def test_a_pool_never_has_more_than_there_is_room_for() -> None:
    lock, running, most = threading.Lock(), [0, 0, 0], [0, 0, 0]

    def work(need: Need, cancelled: Callable[[], bool]) -> None:
        taken = (1, need.cores, need.memory_bytes)
        with lock:
            running[:] = [have + more for have, more in zip(running, taken, strict=True)]
            most[:] = map(max, most, running)
        time.sleep(0.02)
        with lock:
            running[:] = [have - more for have, more in zip(running, taken, strict=True)]

    items = [Need(3 * GIB, 1), Need(GIB, 2), Need(GIB, 1), Need(6 * GIB, 1)] * 3
    pool = Pool(Room(3, 3, 6 * GIB), lambda need: need, work)
    assert len(list(pool.results(items))) == len(items)
    assert most[0] <= 3
    assert most[1] <= 3
    assert most[2] <= 6 * GIB


def test_one_that_needs_all_processors_runs_alone_and_is_not_passed_over() -> None:
    order: list[int] = []

    def work(item: tuple[int, Need], cancelled: Callable[[], bool]) -> None:
        order.append(item[0])
        time.sleep(0.01)

    items = list(enumerate([Need(0, 1), Need(0, 8), Need(0, 1), Need(0, 1)]))
    list(Pool(Room(4, 2, GIB), lambda item: item[1], work).results(items))
    assert order[:2] == [0, 1]


def test_a_pool_that_is_left_ends_its_work() -> None:
    ended = threading.Event()

    def work(item: int, cancelled: Callable[[], bool]) -> int:
        while item and not cancelled():
            time.sleep(0.01)
        if item:
            ended.set()
        return item

    results = Pool(Room(2, 2, 0), lambda _: Need(), work).results([0, 1])
    assert next(results)[1] == 0
    results.close()  # type: ignore[attr-defined]
    assert ended.wait(5)


@pytest.mark.parametrize(
    ("room", "needs", "words"),
    [
        (Room(8, 2, 64 * GIB, 8), [Need(GIB, 1)] * 9, "2 at once, limited by 2 processors"),
        (Room(8, 16, 3 * GIB, 8), [Need(GIB, 1)] * 9, "3 at once, limited by 3.0 GiB of memory"),
        (Room(2, 16, 64 * GIB, 2), [Need(GIB, 1)] * 9, "2 at once, limited by -j 2"),
        (Room(8, 16, 64 * GIB, 8), [Need(GIB, 1)] * 3, "3 at once, limited by 3 in all"),
        (Room(8, 2, 64 * GIB, 8), [Need(GIB, 9)] * 3, "1 at once, limited by 2 processors"),
    ],
)
def test_what_limits_is_said(room: Room, needs: list[Need], words: str) -> None:
    assert room.words(needs) == words


def test_needs_are_only_of_what_a_cluster_declares() -> None:
    need = Need(4 * GIB, 2, kvm=True)
    assert needed(need, {}) == {}
    assert needed(need, {"memory": 1, "gpus": 2}) == {"memory": 4 * GIB}
    small = Worker("a", 1, {"memory": 2.0 * GIB})
    large = Worker("b", 1, {"memory": 8.0 * GIB, "kvm": 1})
    assert missing(need, [small, large]) == ""
    assert missing(need, [small]) == "no worker declares the resource 'kvm'"
    assert missing(Need(4 * GIB, 2), [Worker("c", 1, {})]) == ""
    assert "the largest worker has 2.0" in missing(Need(4 * GIB, 2), [small])
    apart = [Worker("d", 1, {"memory": 8.0 * GIB, "cores": 1}), Worker("e", 1, {"cores": 4})]
    assert missing(Need(4 * GIB, 2), apart).startswith("no worker has")


def cell(verdict: Verdict) -> CellRecord:
    return CellRecord("n", "k", {}, verdict)


def test_what_has_no_end_is_never_a_pass() -> None:
    passed, skipped, failed = map(cell, (Verdict.PASS, Verdict.SKIP, Verdict.FAIL))
    assert exit_code([passed, skipped], missing=0, interrupted=False) is ExitCode.PASS
    assert exit_code([skipped], missing=0, interrupted=False) is ExitCode.SKIP
    assert exit_code([passed], missing=1, interrupted=False) is ExitCode.ERROR
    assert exit_code([passed, failed], missing=1, interrupted=False) is ExitCode.FAIL
    assert exit_code([passed], missing=1, interrupted=True) is ExitCode.INTERRUPTED
    assert exit_code([], missing=0, interrupted=False) is ExitCode.BAD_INPUT
    assert word([passed, failed, failed])[0] == "FAIL 2/3"


def test_a_worker_of_another_version_runs_nothing() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(HostError, match=r"the worker has testbed .*, the matrix is of 0\.0"):
        work(None, {}, "0.0")  # type: ignore[arg-type]


@pytest.mark.parametrize("on_terminal", [True, False])
def test_one_display_tells_each_end(
    on_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1" if on_terminal else "")
    if not on_terminal:
        monkeypatch.delenv("FORCE_COLOR")
    with shown(3, 1) as display:
        display.started("a [cell]")
        display.ended("a [cell]", Verdict.FAIL, "one is not [two]", 1.25)
        display.ended("b", Verdict.PASS, "", 2.0)
    out, errors = capsys.readouterr()
    assert not out
    assert "a [cell] (1.2 s): one is not [two]" in errors
    assert ("[1/2] FAIL" in errors) is not on_terminal


def test_logs_come_back_and_the_largest_stay_behind(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "run").mkdir(parents=True)
    there.mkdir()
    (here / "run" / "console.log").write_bytes(b"x" * 5000)
    (here / "run" / "record.json").write_text("{}")
    (here / "link").symlink_to("/etc/passwd")
    unpack(pack(here, 4000), there)
    found = sorted(str(p.relative_to(there)) for p in there.rglob("*") if p.is_file())
    assert found == [LEFT_BEHIND, "run/record.json"]
    assert (there / LEFT_BEHIND).read_text() == "run/console.log: 5000 bytes\n"


def test_what_comes_back_stays_in_its_folder(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(tarfile.TarError):
        unpack(buffer.getvalue(), folder)
    assert not (tmp_path / "outside").exists()
