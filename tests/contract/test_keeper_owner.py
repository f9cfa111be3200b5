# SPDX-License-Identifier: Apache-2.0
"""What becomes of a rack when a process around it dies, stops, or is interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.errors import HostError, NoSuchRack, RackGone
from testbed.machine.rack_record import RackRecord
from testbed.machine.registry import RackState, find, list_racks, reserve
from testbed.machine.spawn import attach, end_rack, start_keeper
from tests.contract.machine_fakes import alive, eventually, fake_qemu, run_python

OWNER = """
import sys, time
from pathlib import Path
from testbed.machine.registry import reserve
from testbed.machine.spawn import start_keeper
from tests.contract.machine_fakes import fake_helper, fake_qemu

base, run, end, *helpers = sys.argv[1:]
commands = [fake_helper("slow", ready_timeout_s=60) for _ in helpers]
commands += [fake_qemu("host0"), fake_qemu("host1")]
try:
    if helpers:
        print("starting", flush=True)
    keeper = start_keeper(reserve(Path(base), "rack"), commands, run_folder=Path(run))
    if end == "detach":
        keeper.detach()
    print(keeper.pid, *(p["pid"] for p in keeper.status()["processes"]), flush=True)
    if end == "wait":
        time.sleep(100)
    keeper.close()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(0.3)
    if "keeper" in globals():
        print(keeper.exit_of("host0"), keeper.exit_of("host1"), flush=True)
        keeper.close()
"""


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "runtime"
    yield folder
    for info in list_racks(folder):
        end_rack(folder, info.name, timeout_s=2)


@contextlib.contextmanager
def owner(base: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    run_folder = base.parent / "run"
    run_folder.mkdir(exist_ok=True)
    with run_python(OWNER, str(base), str(run_folder), *words) as process:
        try:
            yield process
        finally:
            process.kill()


def read_pids(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def gone(base: Path, pids: list[int]) -> bool:
    return not any(map(alive, pids)) and not list((base / "racks").iterdir())


def test_nothing_is_left_of_a_killed_owner(base: Path) -> None:
    with owner(base, "wait") as process:
        pids = read_pids(process)
        assert len(pids) == 3
        assert all(map(alive, pids))
        process.kill()
        assert eventually(lambda: gone(base, pids))


def test_nothing_is_left_of_an_owner_killed_while_it_starts(base: Path) -> None:
    with owner(base, "wait", "helper") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        assert eventually(lambda: bool(list_racks(base) and list_racks(base)[0].processes))
        (info,) = list_racks(base)
        assert info.state is RackState.STARTING
        process.kill()
        pids = [info.keeper_pid, *(p["pid"] for p in info.processes if p["pid"])]
        assert len(pids) == 2
        assert eventually(lambda: gone(base, pids))


def test_ctrl_c_is_the_owners_alone(base: Path) -> None:
    """The terminal signals the whole foreground group; machines must not be in it."""
    with owner(base, "wait") as process:
        pids = read_pids(process)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=20)
        assert output == "interrupted\nNone None\n"
        assert errors == ""
        assert process.returncode == 0
        assert gone(base, pids)


def test_ctrl_c_while_a_rack_starts(base: Path) -> None:
    with owner(base, "wait", "helper") as process:
        assert eventually(lambda: bool(list_racks(base) and list_racks(base)[0].processes))
        (info,) = list_racks(base)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=20)
        assert (output, errors) == ("starting\ninterrupted\n", "")
        assert gone(base, [info.keeper_pid])


def test_a_detached_rack_outlives_its_owner(base: Path) -> None:
    with owner(base, "detach") as process:
        pids = read_pids(process)
        output, errors = process.communicate(timeout=20)
        assert (output, errors, process.returncode) == ("", "", 0)
    (info,) = list_racks(base)
    assert (info.name, info.state, info.detached) == ("rack", RackState.RUNNING, True)
    assert info.keeper_pid == pids[0]
    assert all(map(alive, pids))
    with attach(base, "rack") as keeper:
        assert keeper.exit_of("host1") is None
        keeper.kill("host1")
        assert keeper.wait_exit("host1", 5)
    assert find(base, "rack").state is RackState.DEGRADED
    with attach(base, "rack") as keeper:  # learns of exits before its time
        ended = keeper.exit_of("host1")
        assert ended is not None
        assert ended.status == -signal.SIGKILL
    end_rack(base, "rack")
    assert eventually(lambda: gone(base, pids))
    with pytest.raises(NoSuchRack):
        end_rack(base, "rack")


def test_a_dead_keepers_folder_is_cleaned_by_the_next_command(base: Path) -> None:
    with owner(base, "detach") as process:
        pids = read_pids(process)
    os.kill(pids[0], signal.SIGKILL)
    assert eventually(lambda: not any(map(alive, pids)))
    assert (base / "racks/rack").exists()
    assert list_racks(base) == []
    assert gone(base, pids)


def test_a_dead_keepers_name_is_free(base: Path) -> None:
    with owner(base, "detach") as process:
        pids = read_pids(process)
    os.kill(pids[0], signal.SIGKILL)
    with reserve(base, "rack") as reservation:
        assert not (reservation.folder / "keeper.sock").exists()


def test_a_keeper_that_hangs_can_be_ended(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.machine.registry.STATUS_TIMEOUT_S", 0.2)
    with owner(base, "detach") as process:
        pids = read_pids(process)
    os.kill(pids[0], signal.SIGSTOP)
    (info,) = list_racks(base)
    assert info.state is RackState.UNRESPONSIVE
    with pytest.raises(HostError, match="did not answer"):
        attach(base, "rack", timeout_s=0.2)
    end_rack(base, "rack", timeout_s=0.2)
    assert eventually(lambda: gone(base, pids))


def test_shutdown_by_another_is_told_to_the_owner(base: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    with start_keeper(reserve(base, "rack"), [fake_qemu()], run_folder=run_folder) as keeper:
        end_rack(base, "rack")
        with pytest.raises(RackGone, match="the rack 'rack' is gone: asked to") as caught:
            keeper.wait_exit("host0", 5)
        assert str(run_folder) in getattr(caught.value, "hint", "")
        keeper.shutdown()
        keeper.shutdown()
    assert not alive(keeper.pid)


def test_a_later_command_finds_the_record(base: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    record = RackRecord("rack", run_folder, ("host0",), plan={"functions": []})
    with reserve(base, "rack") as reservation:
        reservation.write_record(record)
        with start_keeper(reservation, [fake_qemu()], run_folder=run_folder):
            found = find(base, "rack")
            assert found.record == record
            assert (found.folder / "rack.json").stat().st_mode & 0o777 == 0o600
            assert found.folder.stat().st_mode & 0o777 == 0o700
            with attach(base, "rack") as keeper:
                assert keeper.run_folder == run_folder
