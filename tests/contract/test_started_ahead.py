# SPDX-License-Identifier: Apache-2.0
"""Racks that start before they are known: a keeper ahead, its nursling, and what is remembered."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.errors import LaunchError
from testbed.machine import ahead, early, spawn
from testbed.machine.ahead import AnotherRack
from testbed.machine.client import Keeper
from testbed.machine.command import MemoryFd
from testbed.machine.processes import Command, HelperCommand
from testbed.machine.registry import list_racks, reserve
from tests.contract.machine_fakes import alive, eventually, fake_helper, fake_qemu

WORDS = ("up", "rack", "--warm")
PROGRAM = "tests.contract.nursed_program"
VRAM = MemoryFd(100, "gpu0.vram", 1 << 20)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for kind in ("CACHE", "STATE", "RUNTIME"):
        monkeypatch.setenv(f"TESTBED_{kind}_DIR", str(tmp_path / kind.lower()))
    # A command that another test ran in this process may have left a keeper that waits.
    monkeypatch.setattr(early, "_ours", early.Keepers())
    yield
    ahead.end()
    early._ours.end()
    assert not list_racks(tmp_path / "runtime")


def nursed(name: str = "models") -> HelperCommand:
    helper = fake_helper(name, exit=[0, 9])  # executed, it ends
    return replace(helper, nursed=(f"{name}.sock",), memory=(VRAM,))


def start(tmp_path: Path, *commands: Command) -> Keeper:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    return spawn.start_keeper(reserve(tmp_path / "runtime", "rack"), commands, run_folder=run)


def remembered(tmp_path: Path, *commands: Command, files: dict[str, str | Path]) -> None:
    """As an earlier command leaves it."""
    ahead.begin(WORDS)
    run = tmp_path / "run"
    run.mkdir()
    keeper = spawn.start_keeper(reserve(tmp_path / "runtime", "rack"), commands, run_folder=run)
    ahead.remember(keeper, spawn.plan_of(keeper.folder, commands, run), files)
    keeper.close()


def test_a_nursling_takes_the_place_of_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "MODELS", PROGRAM)
    keeper = start(tmp_path, nursed(), fake_qemu())
    try:
        (helper, _) = keeper.status()["processes"]
        said = json.loads((tmp_path / "run/host0/models.log").read_text())
        assert said["pid"] == helper["pid"]
        assert said["cwd"] == str(tmp_path / "runtime/racks/rack/host0")
        assert said["fds"][:4] == [0, 1, 2, 3]  # 3 is the listing's own
        assert said["fds"][4:] == [VRAM.fd]
        assert said["words"][1:] == [PROGRAM, "models.sock"]
        keeper.kill("models")
        ended = keeper.wait_exit("models", 10)
        assert ended is not None
        assert ended.status == -signal.SIGKILL
    finally:
        keeper.close()
    assert not alive(helper["pid"])


def test_a_nursling_that_cannot_be_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "MODELS", "tests.contract.no_such_program")
    with pytest.raises(LaunchError, match=r"No module named.*no_such_program"):
        start(tmp_path, nursed(), fake_qemu())


def _is_dead(pid: int) -> bool:
    """It has ended, and nobody has asked how."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_nursling_that_was_killed_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "MODELS", PROGRAM)
    started = early.take(PROGRAM)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    assert eventually(lambda: children.read_text() != "")
    nursling = int(children.read_text())
    os.kill(nursling, signal.SIGKILL)
    # While it dies it can still be told what to do, and nobody would do it.
    assert eventually(lambda: _is_dead(nursling))
    monkeypatch.setattr(early, "take", lambda _module: started)
    plain = replace(fake_helper("models", touch=[0, "models.sock"]), nursed=("models.sock",))
    keeper = start(tmp_path, plain, fake_qemu())
    try:
        assert {each["state"] for each in keeper.status()["processes"]} == {"running"}
    finally:
        keeper.close()


def test_a_nursling_that_nobody_needs_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "MODELS", PROGRAM)
    early.begin()
    keeper = start(tmp_path, fake_qemu())
    try:
        children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
        assert [int(pid) for pid in children] == [p["pid"] for p in keeper.status()["processes"]]
    finally:
        keeper.close()


def test_a_keeper_ahead_ends_with_its_command() -> None:
    started = early.take(PROGRAM)
    assert alive(started.pid)
    started.close()
    assert eventually(lambda: not alive(started.pid))
    os.waitpid(started.pid, 0)


def test_the_same_again_is_there_already(tmp_path: Path) -> None:
    commands = (fake_helper("slow", touch=[0, "slow.sock"]), fake_qemu(memory=(VRAM,)))
    state = tmp_path / "state.bin"
    state.write_bytes(b"\xff")
    files: dict[str, str | Path] = {"host0/models.json": "{}", "host0/machine.state": state}
    remembered(tmp_path, *commands, files=files)
    ahead.begin(WORDS)
    begun = ahead.take("rack")
    assert begun is not None
    told = spawn.plan_of(begun.reservation.folder, commands, begun.run_dir)
    keeper = begun.keeper_of(told, files)
    try:
        assert {each["state"] for each in keeper.status()["processes"]} == {"running"}
        assert (keeper.folder / "host0/models.json").read_text() == "{}"
        copy = keeper.folder / "host0/machine.state"
        assert (copy.read_bytes(), copy.stat().st_mode & 0o777) == (b"\xff", 0o600)
        assert (keeper.folder / "host0/log").resolve() == begun.run_dir / "host0"
        assert begun.run_dir.parent == tmp_path / "state/runs"
        assert keeper.status()["memory"] == {"host0/gpu0.vram": VRAM.size_bytes}
    finally:
        keeper.close()


@pytest.mark.parametrize("what", ["process", "memory", "file", "another file"])
def test_anything_else_ends_it(tmp_path: Path, what: str) -> None:
    before = fake_qemu(memory=(VRAM,), report=False)
    state = tmp_path / "state.bin"
    state.touch()
    remembered(tmp_path, before, files={"host0/models.json": "{}", "host0/machine.state": state})
    ahead.begin(WORDS)
    begun = ahead.take("rack")
    assert begun is not None
    memory = replace(VRAM, size_bytes=8192) if what == "memory" else VRAM
    command = fake_qemu(memory=(memory,), report=what == "process")
    files: dict[str, str | Path] = {
        "host0/models.json": "[]" if what == "file" else "{}",
        "host0/machine.state": tmp_path / "other.bin" if what == "another file" else state,
    }
    told = spawn.plan_of(begun.reservation.folder, [command], begun.run_dir)
    with pytest.raises(AnotherRack), begun:
        begun.keeper_of(told, files)
    assert not begun.run_dir.exists()
    assert not list((tmp_path / "runtime/racks").iterdir())
    assert not alive(begun.keeper.pid)


def saved(file: Path) -> MemoryFd:
    return MemoryFd(99, "ram", file.stat().st_size, str(file))


def test_memory_that_is_a_file_has_to_be_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_bytes(b"1" * 4096)
    command = fake_qemu(memory=(saved(file),))
    remembered(tmp_path, command, files={})
    ahead.begin(WORDS)
    begun = ahead.take("rack")
    assert begun is not None
    told = spawn.plan_of(begun.reservation.folder, [command], begun.run_dir)
    with begun:
        begun.keeper_of(told, {}).close()
    ahead.begin(WORDS)
    begun = ahead.take("rack")
    assert begun is not None
    file.unlink()
    file.write_bytes(b"2" * 4096)
    told = spawn.plan_of(begun.reservation.folder, [command], begun.run_dir)
    with pytest.raises(AnotherRack), begun:
        begun.keeper_of(told, {})


def test_memory_that_is_gone_starts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_bytes(b"1" * 4096)
    remembered(tmp_path, fake_qemu(memory=(saved(file),)), files={})
    file.unlink()
    ahead.begin(WORDS)
    assert ahead.take("rack") is None


def test_what_does_not_start_any_more_ends_it(tmp_path: Path) -> None:
    remembered(tmp_path, fake_qemu(), files={})
    (file,) = (tmp_path / "cache/remembered").glob("ahead-*")
    broken = fake_qemu()
    broken = replace(broken, argv=("/no/such/program",))
    stored = json.loads(file.read_text())
    stored["told"]["processes"][0]["argv"] = list(broken.argv)
    file.write_text(json.dumps(stored))
    ahead.begin(WORDS)
    begun = ahead.take("rack")
    assert begun is not None
    with pytest.raises(AnotherRack), begun:
        begun.keeper_of(
            spawn.plan_of(begun.reservation.folder, [broken], begun.run_dir),
            {},
        )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "rack", "told": 3}', '{"name": "/"}'])
def test_garbage_starts_nothing(tmp_path: Path, text: str) -> None:
    remembered(tmp_path, fake_qemu(), files={})
    (file,) = (tmp_path / "cache/remembered").glob("ahead-*")
    file.write_text(text)
    ahead.begin(WORDS)
    assert ahead.take("rack") is None
    assert not (tmp_path / "state/runs").exists() or not list((tmp_path / "state/runs").iterdir())


def test_a_name_that_is_taken_starts_nothing(tmp_path: Path) -> None:
    remembered(tmp_path, fake_qemu(), files={})
    with reserve(tmp_path / "runtime", "rack"):
        ahead.begin(WORDS)
        assert ahead.take("rack") is None
