# SPDX-License-Identifier: Apache-2.0
"""The process that a command's further keepers are forks of: who they are, and who ends when."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed import cli
from testbed.machine import early, spawn
from testbed.machine.client import Keeper
from testbed.machine.early import Keepers, Started
from testbed.machine.processes import Command
from testbed.machine.registry import list_racks, reserve
from tests.contract.machine_fakes import alive, eventually, fake_helper, fake_qemu, run_python

PROGRAM = "tests.contract.nursed_program"

COMMAND = """
import sys, time
from pathlib import Path
from testbed.machine import early
from testbed.machine.registry import reserve
from testbed.machine.spawn import start_keeper
from tests.contract.machine_fakes import fake_qemu

base, run, end = sys.argv[1:]
pids = []
for name in ("one", "two", "three"):
    keeper = start_keeper(reserve(Path(base), name), [fake_qemu()], run_folder=Path(run) / name)
    if end == "detach":
        keeper.detach()
    pids += [keeper.pid, *(p["pid"] for p in keeper.status()["processes"])]
    globals()[name] = keeper
print(early._ours._mother.pid, *pids, flush=True)
if end == "wait":
    time.sleep(100)
for keeper in (one, two, three):
    keeper.close()
"""


@pytest.fixture
def keepers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Keepers]:
    """This process's, as of a command that has started nothing."""
    fresh = Keepers()
    monkeypatch.setattr(early, "_ours", fresh)
    monkeypatch.setattr(early, "MODELS", PROGRAM)
    yield fresh
    fresh.end()


@pytest.fixture
def born(keepers: Keepers) -> Iterator[Started]:
    """A keeper that a mother forked."""
    keepers.begin(several=True)
    started = keepers.take(PROGRAM)
    yield started
    with contextlib.suppress(OSError):
        started.close()


def mother_of(keepers: Keepers) -> int:
    assert keepers._mother is not None
    return keepers._mother.pid


def of(pid: int, what: str) -> str:
    return Path(f"/proc/{pid}/{what}").read_text()


def parent(pid: int) -> int:
    return int(of(pid, "stat").rpartition(")")[2].split()[1])


def children(pid: int) -> list[int]:
    return [int(word) for word in of(pid, f"task/{pid}/children").split()]


def status(pid: int) -> dict[str, str]:
    return dict(line.split(":", 1) for line in of(pid, "status").splitlines())


def open_files(pid: int) -> dict[str, str]:
    folder = Path(f"/proc/{pid}/fd")
    return {fd: os.readlink(folder / fd).partition(":")[0] for fd in os.listdir(folder)}  # noqa: PTH115, PTH208


def start(tmp_path: Path, name: str) -> Keeper:
    helper = fake_helper("models", exit=[0, 9])  # executed, it ends
    run = tmp_path / "run" / name
    run.mkdir(parents=True, exist_ok=True)
    commands: list[Command] = [replace(helper, nursed=("models.sock",)), fake_qemu()]
    return spawn.start_keeper(reserve(tmp_path / "runtime", name), commands, run_folder=run)


def said(tmp_path: Path, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((tmp_path / "run" / name / "host0/models.log").read_text())
    return value


def runs(keeper: Keeper) -> bool:
    return {each["state"] for each in keeper.status()["processes"]} == {"running"}


def test_who_starts_one_rack_has_no_mother(keepers: Keepers) -> None:
    keepers.begin()
    started = keepers.take(PROGRAM)
    assert parent(started.pid) == os.getpid()
    assert keepers._mother is None
    started.close()
    os.waitpid(started.pid, 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("up rack", [False]),
        ("run -t rack", [True]),
        ("run -t rack -j 2", []),  # each of these runs is a command
        ("run --rack rack", []),
        ("ps", []),
    ],
)
def test_which_command_says_that_it_starts_several(
    words: str, told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[bool] = []
    monkeypatch.setattr(early, "begin", lambda *, several: began.append(several))
    cli._begin(words.split())
    assert began == told


def test_further_keepers_are_like_the_first(keepers: Keepers) -> None:
    first, *others = [keepers.take(PROGRAM) for _ in range(3)]
    mother = mother_of(keepers)
    pids = [started.pid for started in (first, *others)]
    assert [parent(pid) for pid in pids] == [os.getpid(), mother, mother]
    assert all(eventually(lambda pid=pid: len(children(pid)) == 1) for pid in pids)  # type: ignore[misc]
    waiting = {"0", "1", "2", "3", "10"}
    assert all(eventually(lambda pid=pid: set(open_files(pid)) == waiting) for pid in pids)  # type: ignore[misc]
    for what in ("cmdline", "environ"):
        assert len({of(pid, what).rstrip("\0") for pid in pids}) == 1, what
    for what in ("SigBlk", "SigIgn", "SigCgt", "Umask"):
        assert len({status(pid)[what] for pid in pids}) == 1, what
    assert len({os.readlink(f"/proc/{pid}/cwd") for pid in pids}) == 1  # noqa: PTH115
    assert [os.getsid(pid) for pid in pids] == pids
    assert os.getsid(mother) == mother
    assert open_files(pids[0]) == open_files(pids[1]) == open_files(pids[2])
    for started in (first, *others):
        started.close()
    assert eventually(lambda: not any(alive(pid) for pid in pids))
    os.waitpid(first.pid, 0)


def test_racks_of_one_mother(keepers: Keepers, tmp_path: Path) -> None:
    keepers.begin(several=True)
    one, two = start(tmp_path, "one"), start(tmp_path, "two")
    mother = mother_of(keepers)
    files = open_files(mother)
    pids = [process["pid"] for keeper in (one, two) for process in keeper.status()["processes"]]
    assert runs(one)
    assert runs(two)
    # What she had imported, they did not import; but chance is their own.
    assert [said(tmp_path, name)["pid"] for name in ("one", "two")] == [mother, mother]
    assert said(tmp_path, "one")["random"] != said(tmp_path, "two")["random"]
    assert said(tmp_path, "one")["words"][1:] == [PROGRAM, "models.sock"]
    assert sorted(files.values()) == ["/dev/null"] * 3 + ["anon_inode"] * 2 + ["socket"]
    one.close()
    assert runs(two)
    two.close()
    assert not any(alive(pid) for pid in (*pids, one.pid, two.pid))
    assert eventually(lambda: children(mother) == [])  # nor one that has ended
    left = ["/dev/null"] * 3 + ["socket"]
    assert eventually(lambda: sorted(open_files(mother).values()) == left)
    keepers.end()
    assert not Path(f"/proc/{mother}").exists()


def test_a_closed_rack_s_keeper_has_ended(keepers: Keepers, tmp_path: Path) -> None:
    """Who closes a rack may take its name at once: nobody holds its lock any more."""
    keepers.begin(several=True)
    for _ in range(3):
        keeper = start(tmp_path, "one")
        assert parent(keeper.pid) == mother_of(keepers)
        keeper.close()
        assert not alive(keeper.pid)


def test_a_rack_outlives_its_mother(keepers: Keepers, tmp_path: Path) -> None:
    keepers.begin(several=True)
    one = start(tmp_path, "one")
    mother = mother_of(keepers)
    os.kill(mother, signal.SIGKILL)
    assert eventually(lambda: not alive(mother))
    assert runs(one)
    two = start(tmp_path, "two")  # and there is another way to get one
    assert parent(two.pid) == os.getpid()
    assert not Path(f"/proc/{mother}").exists()
    for keeper in (one, two):
        assert runs(keeper)
        keeper.close()
        assert not alive(keeper.pid)
    assert not Path(f"/proc/{two.pid}").exists()
    assert keepers._mother is None


def test_without_a_mother_keepers_are_started(
    keepers: Keepers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "MOTHER", "raise SystemExit(1)")
    keepers.begin(several=True)
    for _ in range(2):
        started = keepers.take(PROGRAM)
        assert parent(started.pid) == os.getpid()
        started.close()
        os.waitpid(started.pid, 0)


def test_a_mother_that_hangs_is_done_without(
    keepers: Keepers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "MOTHER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(early, "MOTHER_END_S", 0.1)
    keepers.begin(several=True)
    mother = mother_of(keepers)
    os.kill(mother, signal.SIGSTOP)
    started = keepers.take(PROGRAM)
    assert parent(started.pid) == os.getpid()
    assert not Path(f"/proc/{mother}").exists()
    started.close()
    os.waitpid(started.pid, 0)


def test_who_is_interrupted_leaves_no_keeper(
    keepers: Keepers, born: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Her answer comes to nobody, and is not taken for that to the next question."""
    mother = mother_of(keepers)
    receive = socket.recv_fds
    unasked: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        answer = receive(*arguments)
        unasked.append(int(answer[0]))
        os.close(answer[1][0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(socket, "recv_fds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keepers.take(PROGRAM)
    assert eventually(lambda: not alive(unasked[0]))
    assert not Path(f"/proc/{mother}").exists()
    assert alive(born.pid)
    started = keepers.take(PROGRAM)
    assert parent(started.pid) == os.getpid()
    started.close()
    os.waitpid(started.pid, 0)


def test_many_ask_at_once(keepers: Keepers) -> None:
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda _: keepers.take(), range(16)))
    pids = [started.pid for started in many]
    assert len(set(pids)) == 16
    assert sorted({parent(pid) for pid in pids}) == sorted({os.getpid(), mother_of(keepers)})
    while many:  # each has a socket and a pidfd of its own
        started = many.pop()
        assert alive(started.pid)
        started.close()
        assert eventually(lambda pid=started.pid: not alive(pid))  # type: ignore[misc]
        assert all(alive(other.pid) for other in many)
    (ours,) = (pid for pid in pids if pid in children(os.getpid()))
    os.waitpid(ours, 0)


def test_a_fork_of_the_command_does_not_ask_her(keepers: Keepers) -> None:
    keepers.begin(several=True)
    keepers._owner += 1
    started = keepers.take(PROGRAM)
    keepers._owner -= 1
    assert parent(started.pid) == os.getpid()
    started.close()
    os.waitpid(started.pid, 0)


@pytest.mark.parametrize("end", ["wait", "detach", "close"])
def test_what_is_left_of_a_command(tmp_path: Path, end: str) -> None:
    base = tmp_path / "runtime"
    for name in ("one", "two", "three"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with run_python(COMMAND, str(base), str(tmp_path / "run"), end) as process:
        assert process.stdout is not None
        mother, *pids = [int(word) for word in process.stdout.readline().split()]
        if end == "wait":
            assert [parent(pid) for pid in pids[::2]] == [process.pid, mother, mother]
            process.kill()
        output, errors = process.communicate(timeout=20)
        assert output == ""
        assert errors == ""
    assert eventually(lambda: not alive(mother))
    if end == "detach":
        try:
            assert {info.name for info in list_racks(base)} == {"one", "two", "three"}
            assert all(map(alive, pids))
        finally:
            for info in list_racks(base):
                spawn.end_rack(base, info.name)
    assert eventually(lambda: not any(map(alive, pids)))
    assert not list((base / "racks").iterdir())


def test_what_keepers_used_is_the_command_s(keepers: Keepers, tmp_path: Path) -> None:
    """As that of processes it had started itself: so it is asked what a run has cost."""
    keepers.begin(several=True)
    code = "import time; memory = bytearray(64 << 20); time.sleep(100)"
    command = replace(fake_qemu(), argv=(sys.executable, "-I", "-S", "-c", code))
    run = tmp_path / "run"
    run.mkdir()
    keeper = spawn.start_keeper(reserve(tmp_path / "runtime", "one"), [command], run_folder=run)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
    (qemu,) = (process["pid"] for process in keeper.status()["processes"])
    assert eventually(lambda: int(status(qemu)["VmRSS"].split()[0]) > 64 << 10)
    mother = mother_of(keepers)
    os.kill(mother, signal.SIGSTOP)  # so late that she learns of both ends at once
    keeper.close()
    timer = threading.Timer(0.2, os.kill, (mother, signal.SIGCONT))
    timer.start()
    keepers.end()
    timer.join()
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before > (64 << 20) // 4096
