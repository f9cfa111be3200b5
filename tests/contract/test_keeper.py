# SPDX-License-Identifier: Apache-2.0
"""Real keepers and fake QEMUs: what runs, what is shared, how starts fail."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import HostError, LaunchError, LostError
from testbed.machine.command import MemoryFd, NodeCommand
from testbed.machine.keeper import SOCKET
from testbed.machine.registry import RackState, find, reserve
from testbed.machine.sockets import connect_unix
from testbed.machine.spawn import Command, Keeper, start_keeper
from tests.contract.machine_fakes import ROOT, alive, eventually, fake_helper, fake_qemu

VRAM = MemoryFd(100, "gpu0.vram", 1 << 20)
StartRack = Callable[..., Keeper]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "runtime"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def start(base: Path, run_folder: Path) -> Iterator[StartRack]:
    """Start a rack; at the end, close it and see that nothing is left of it."""
    keepers: list[Keeper] = []

    def start_rack(*commands: Command, name: str = "rack") -> Keeper:
        keeper = start_keeper(reserve(base, name), commands, run_folder=run_folder)
        keepers.append(keeper)
        return keeper

    yield start_rack
    for keeper in keepers:
        keeper.close()
        assert not alive(keeper.pid)
    assert not (base / "racks").exists() or not list((base / "racks").iterdir())


def pids(keeper: Keeper) -> dict[str, int]:
    return {process["name"]: process["pid"] for process in keeper.status()["processes"]}


def said(run_folder: Path, node: str = "host0") -> str:
    return (run_folder / node / "qemu.log").read_text()


def test_exits_are_told_with_status_and_signal(start: StartRack) -> None:
    keeper = start(fake_qemu("host0", exit=[0.05, 7]), fake_qemu("host1"), fake_qemu("host2"))
    assert keeper.exit_of("host1") is None
    ended = keeper.wait_exit("host0", 5)
    assert ended is not None
    assert (ended.status, str(ended)) == (7, "ended with status 7")
    assert time.time() - ended.time_s < 60
    keeper.kill("host1")
    ended = keeper.wait_exit("host1", 5)
    assert ended is not None
    assert (ended.status, str(ended)) == (-9, "was killed by SIGKILL")
    keeper.stop("host2")
    assert str(keeper.wait_exit("host2", 5)) == "was killed by SIGTERM"


def test_waiting_for_an_exit_has_a_deadline(start: StartRack) -> None:
    keeper = start(fake_qemu())
    begun_s = time.monotonic()
    assert keeper.wait_exit("host0", 0.1) is None
    assert 0.1 <= time.monotonic() - begun_s < 2


def test_what_a_qemu_inherits(start: StartRack, run_folder: Path, base: Path) -> None:
    leak, other = os.pipe()
    os.set_inheritable(leak, True)
    os.set_inheritable(other, True)
    try:
        # Targets that are each other's sources in the keeper, where memory is numbered upwards.
        low = tuple(MemoryFd(fd, f"gpu{fd}.vram", 4096) for fd in range(20, 3, -1))
        keeper = start(fake_qemu(memory=(*low, VRAM), report=True))
        assert eventually(lambda: said(run_folder).endswith("}\n"))
    finally:
        os.close(leak)
        os.close(other)
    report: dict[str, Any] = json.loads(said(run_folder))
    fds = report["fds"]
    log = str(run_folder / "host0/qemu.log")
    assert (fds.pop("0"), fds.pop("1"), fds.pop("2")) == ("/dev/null", log, log)
    assert fds.pop("100") == "/memfd:host0/gpu0.vram (deleted)"
    for fd in range(4, 21):
        assert fds.pop(str(fd)) == f"/memfd:host0/gpu{fd}.vram (deleted)"
    assert not fds
    assert report["folder"] == str(base / "racks/rack/host0")
    assert (base / "racks/rack/host0/log").readlink() == run_folder / "host0"
    assert report["leads_session"]
    assert report["core"] == [0, 0]
    assert report["umask"] == 0o077
    assert set(report["environment"]) - {"LC_CTYPE"} == {"PATH", "LC_ALL"}
    assert Path(f"/proc/{keeper.pid}/fd/0").exists()


def test_no_signal_is_left_ignored(start: StartRack, run_folder: Path) -> None:
    keeper = start(NodeCommand("host0", ("grep", "SigIgn", "/proc/self/status")))
    assert keeper.wait_exit("host0", 5)
    ignored = int(said(run_folder).split()[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        assert not ignored & 1 << number - 1


def test_memory_is_shared_sealed_and_kept_over_a_restart(start: StartRack) -> None:
    command = fake_qemu(memory=(VRAM,))
    keeper = start(command)
    memory = keeper.open_memory("host0/gpu0.vram")
    assert len(memory) == VRAM.size_bytes
    memory[:4] = b"kept"
    with Path(f"/proc/{pids(keeper)['host0']}/fd/100").open("r+b") as inside:
        assert inside.read(4) == b"kept"
        inside.seek(8)
        inside.write(b"from inside")
        inside.flush()
        with pytest.raises(PermissionError):
            os.ftruncate(inside.fileno(), 4096)
    assert memory[8:19] == b"from inside"
    with pytest.raises(HostError, match="runs already"):
        keeper.start(command)
    keeper.kill("host0")
    assert keeper.wait_exit("host0", 5)
    keeper.start(command)
    assert keeper.exit_of("host0") is None
    with Path(f"/proc/{pids(keeper)['host0']}/fd/100").open("rb") as inside:
        assert inside.read(4) == b"kept"
    memory.close()


def test_unknown_memory_and_processes_are_refused(start: StartRack) -> None:
    keeper = start(fake_qemu())
    with pytest.raises(HostError, match="no such memory: gpu9"):
        keeper.open_memory("gpu9")
    with pytest.raises(HostError, match="no such process: host9"):
        keeper.kill("host9")
    with pytest.raises(HostError, match="no such call: _end"):
        keeper.call("_end")
    with pytest.raises(HostError, match="once"):
        keeper.call("begin", processes=[], memory={})


def test_what_a_machine_started_dies_with_it(start: StartRack, run_folder: Path) -> None:
    keeper = start(fake_qemu(child=True))
    assert eventually(lambda: said(run_folder).endswith("\n"))
    child = int(said(run_folder))
    assert alive(child)
    keeper.kill("host0")
    assert eventually(lambda: not alive(child))


def test_a_program_that_is_not_there(start: StartRack, base: Path, run_folder: Path) -> None:
    with pytest.raises(LaunchError, match=r"no-such-qemu: No such file or directory") as caught:
        start(fake_qemu("host0"), NodeCommand("host1", ("no-such-qemu", "-M", "q35")))
    assert caught.value.node == "host1"
    assert caught.value.command == ("no-such-qemu", "-M", "q35")
    assert caught.value.exit_status is None
    first = (run_folder / "keeper.log").read_text().split("host0 started, pid ")[1].split()[0]
    assert not alive(int(first))
    assert not (base / "racks/rack").exists()


def test_helpers_start_in_order_when_ready(start: StartRack, base: Path) -> None:
    keeper = start(
        fake_helper("gpu-model", touch=[0.15, "gpu-model.sock"]),
        fake_helper("nic-model", touch=[0.05, "nic-model.sock"]),
        fake_qemu(),
    )
    processes = keeper.status()["processes"]
    assert [p["name"] for p in processes] == ["gpu-model", "nic-model", "host0"]
    assert [p["kind"] for p in processes] == ["helper", "helper", "qemu"]
    starts = [p["started_s"] for p in processes]
    assert starts[1] - starts[0] >= 0.15
    assert starts[2] - starts[1] >= 0.05
    keeper.kill("nic-model")
    ended = keeper.wait_exit("nic-model", 5)
    assert ended is not None
    assert ended.name == "nic-model"
    assert find(base, "rack").state is RackState.DEGRADED


def test_a_helper_that_is_never_ready(start: StartRack) -> None:
    begun_s = time.monotonic()
    helper = fake_helper("model", ready_timeout_s=1.5, stderr="model: no licence\n")
    with pytest.raises(LaunchError, match=r"model was not ready within 1\.5 s") as caught:
        start(helper, fake_qemu())
    assert time.monotonic() - begun_s < 10
    assert caught.value.node == "model"
    assert "no licence" in str(caught.value)


def test_a_helper_that_ends_is_not_waited_for(start: StartRack) -> None:
    begun_s = time.monotonic()
    with pytest.raises(LaunchError, match="model ended before it was ready") as caught:
        start(fake_helper("model", ready_timeout_s=30, exit=[0, 4]), fake_qemu())
    assert caught.value.exit_status == 4
    assert time.monotonic() - begun_s < 10


def test_an_old_ready_socket_does_not_count(start: StartRack, base: Path) -> None:
    keeper = start(fake_helper("model", touch=[0, "model.sock"]), fake_qemu())
    keeper.kill("model")
    assert keeper.wait_exit("model", 5)
    assert (base / "racks/rack/host0/model.sock").exists()
    with pytest.raises(LaunchError, match="not ready"):
        keeper.start(fake_helper("model", ready_timeout_s=0.3))
    assert keeper.wait_exit("host0", 0.2) is None  # a failed restart is not the rack's end


def test_the_keeper_stays_when_all_machines_ended(start: StartRack, base: Path) -> None:
    keeper = start(fake_qemu(exit=[0, 0]))
    keeper.wait_exit("host0", 5)
    info = find(base, "rack")
    assert info.state is RackState.DEAD
    assert info.processes[0]["exit_status"] == 0
    assert not info.detached


def test_a_killed_keeper_takes_its_machines_along(start: StartRack) -> None:
    keeper = start(fake_qemu("host0"), fake_qemu("host1"))
    children = list(pids(keeper).values())
    os.kill(keeper.pid, signal.SIGKILL)
    begun_s = time.monotonic()
    with pytest.raises(LostError, match="its keeper process died"):
        keeper.wait_exit("host0", 30)
    assert time.monotonic() - begun_s < 5
    assert eventually(lambda: not any(map(alive, children)))
    with pytest.raises(LostError):
        keeper.status()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_keeper_cleanly(
    start: StartRack, base: Path, number: signal.Signals
) -> None:
    keeper = start(fake_qemu())
    child = pids(keeper)["host0"]
    os.kill(keeper.pid, number)
    with pytest.raises(LostError, match=number.name):
        keeper.wait_exit("host0", 5)
    assert not alive(child)
    assert not (base / "racks/rack").exists()


def test_garbage_and_silence_on_the_socket_do_no_harm(start: StartRack, base: Path) -> None:
    keeper = start(fake_qemu())
    path = base / "racks/rack" / SOCKET
    with (
        connect_unix(path, 5) as silent,
        connect_unix(path, 5) as rude,
        connect_unix(path, 5) as vanished,
    ):
        vanished.sendall(b'{"id": 1, "call": "sta')
        rude.sendall(b"\xff\x00 nonsense\n[]\n" + b'{"id": 1, "call": "kill"}\n')
        answers = rude.makefile("rb")
        for _ in range(3):
            assert json.loads(answers.readline())["error"]["kind"] == "call"
        answers.close()
        assert silent.fileno() > 0
        assert keeper.status()["rack"] == "rack"
    assert keeper.status()["rack"] == "rack"


def test_a_client_that_never_reads_is_dropped(start: StartRack, base: Path) -> None:
    keeper = start(fake_qemu())
    with connect_unix(base / "racks/rack" / SOCKET, 5) as wire:
        questions = b'{"id": 1, "call": "status"}\n' * 200_000
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            wire.sendall(questions)
    assert keeper.status()["rack"] == "rack"


def test_two_racks_at_once(start: StartRack, base: Path) -> None:
    one = start(fake_qemu(memory=(VRAM,)), name="one")
    two = start(fake_qemu(memory=(VRAM,)), name="two")
    with one.open_memory("host0/gpu0.vram") as ours, two.open_memory("host0/gpu0.vram") as theirs:
        ours[:3] = b"one"
        theirs[:3] = b"two"
        assert ours[:3] == b"one"
    one.close()
    assert two.exit_of("host0") is None
    assert find(base, "two").state is RackState.RUNNING


def test_folders_of_any_length(tmp_path: Path) -> None:
    base = tmp_path / ("long-" * 20) / ("long-" * 20)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    with start_keeper(reserve(base, "rack"), [fake_qemu()], run_folder=run_folder):
        assert find(base, "rack").state is RackState.RUNNING


@pytest.mark.skipif(shutil.which("mount") is None, reason="mount is not installed")
def test_a_full_disk_is_named(tmp_path: Path, base: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k,nr_inodes=3", "tmpfs", disk],
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        with (
            reserve(base, "rack") as reservation,
            pytest.raises(HostError, match=rf"{disk}.*No space left on device"),
        ):
            start_keeper(reservation, [fake_qemu()], run_folder=disk)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert not list((base / "racks").iterdir())


def test_the_keeper_starts_light() -> None:
    """Its start is part of every boot: modules that are slow to import must stay out."""
    code = "import sys, testbed.machine.keeper; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    heavy = {"asyncio", "dataclasses", "inspect", "logging", "pathlib", "shutil", "subprocess"}
    assert not heavy & set(modules)


def test_the_lock_is_the_keepers_alone(start: StartRack, base: Path) -> None:
    keeper = start(fake_qemu())
    with (base / "racks/rack/lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(keeper.pid, signal.SIGKILL)
    with pytest.raises(LostError):
        keeper.wait_exit("host0", 5)
    with (base / "racks/rack/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_restart_meets_nothing_of_the_life_before(
    start: StartRack, base: Path, run_folder: Path
) -> None:
    command = fake_qemu(qmp=True, console=[[0, "panic\n"]])
    keeper = start(command)
    path = base / "racks/rack/host0/qmp.sock"
    for life in (1, 2):
        assert eventually(path.exists)
        assert eventually((run_folder / "host0/console.log").exists)
        keeper.kill("host0")
        assert keeper.wait_exit("host0", 5)
        assert path.exists()
        keeper.start(command if life == 1 else fake_qemu())
    assert not path.exists()
    logs = sorted(log.name for log in (run_folder / "host0").glob("console*"))
    assert logs == ["console.1.log", "console.2.log"]


def test_a_stopped_keeper_is_noticed(start: StartRack) -> None:
    keeper = start(fake_qemu())
    os.kill(keeper.pid, signal.SIGSTOP)
    try:
        with pytest.raises(HostError, match=r"did not answer 'status' within 0\.2 s"):
            keeper.call("status", timeout_s=0.2)
    finally:
        os.kill(keeper.pid, signal.SIGCONT)
    assert keeper.status()["rack"] == "rack"
