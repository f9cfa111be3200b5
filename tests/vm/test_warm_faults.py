# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a saved machine and with the host while it is restored.

Whatever is wrong is not used, is said in one line, and ends in a boot, which these tests only see
coming. ``minimal`` is saved once; each test breaks a copy of its own.
"""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed import deploy
from testbed.errors import LinkLost
from testbed.machine import spawn
from testbed.machine.client import Keeper
from testbed.rack import Rack
from testbed.warm import restore
from testbed.warm.store import INDEX, MEMORY, STATE, Store
from tests.vm.conftest import shipped

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

YEAR_S = 365 * 86400
# The oldest process that was started as the listener; agents are its children.
END_LISTENER = """python3 -c '
import os
words = b"guest_agent/__main__.py\\0listen\\0"
every = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
found = [pid for pid in every if words in open(f"/proc/{pid}/cmdline", "rb").read()]
os.kill(found[0], 9)
print(len(found))'"""
# A guest has 1 GiB, for whose addresses there is no room.
ROOM_BYTES = 768 << 20

Restore = Callable[[], Rack]


class Boots(BaseException):
    """It would boot now: nothing that was kept is used."""


@pytest.fixture(scope="module")
def saved(warm: deploy.StartOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The entry of `minimal` in this user's store."""
    keys: list[str] = []
    find = Store.find

    def noting(self: Store, key: str) -> Any:
        keys.append(key)
        return find(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "find", noting)
        with deploy.start(
            shipped("minimal"), run_dir=tmp_path_factory.mktemp("saved"), options=warm
        ):
            return restore.store().folder / keys[-1]


@pytest.fixture
def entry(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in a store of the test's own, which is the one that is used."""
    folder = tmp_path / "warm"
    folder.mkdir(mode=0o700)
    subprocess.run(["cp", "-a", "--sparse=always", saved, folder], check=True)
    monkeypatch.setattr(restore, "store", lambda: Store(folder))
    return folder / saved.name


@pytest.fixture
def start(warm: deploy.StartOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Restore:
    """Restores `minimal`. :raises Boots: where it would boot, to be saved or instead."""
    begin = deploy._start

    def warm_only(*words: Any) -> Rack:
        if not words[2].warm:
            raise Boots
        return begin(*words)

    def save(*_: Any) -> None:
        raise Boots

    monkeypatch.setattr(deploy, "_start", warm_only)
    monkeypatch.setattr(restore, "_save", save)
    return lambda: deploy.start(shipped("minimal"), run_dir=tmp_path / "run", options=warm)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit of the last byte that is not zero: where it was cut it would not be found."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            end = max(0, end - 4096)
            file.seek(end)
            block = file.read(4096)
            if any(block):
                at = max(n for n, byte in enumerate(block) if byte)
                file.seek(end + at)
                file.write(bytes([block[at] ^ 0x10]))
                return


@pytest.mark.parametrize("name", [MEMORY, STATE, INDEX])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_file_is_never_used(
    entry: Path,
    start: Restore,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    damage(entry / name)
    began_s = time.monotonic()
    with pytest.raises(Boots):
        start()
    assert time.monotonic() - began_s < 30
    assert not entry.exists()
    lines = capsys.readouterr().err.splitlines()
    if name == INDEX or damage == Path.unlink:
        assert lines == [], "there is none; it is booted to be saved"
    else:
        assert len(lines) == 1
        assert lines[0].startswith(f"testbed: not restored but booted: {entry / name}")


def test_memory_that_the_host_lacks_is_not_the_saved_machines_fault(
    entry: Path, start: Restore, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = spawn.begin

    def with_little_room(keeper: Keeper, plan: Any) -> None:
        """What the keeper starts inherits it."""
        resource.prlimit(keeper.pid, resource.RLIMIT_AS, (ROOM_BYTES, ROOM_BYTES))
        begin(keeper, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawn, "begin", with_little_room)
        with pytest.raises(Boots):
            start()
    (line,) = capsys.readouterr().err.splitlines()
    assert "emory" in line
    assert entry.exists()
    with start() as rack:
        assert rack.node().agent.call("pci.tree")["devices"]


@pytest.mark.parametrize("moment", ["provide_state", "resume"])
def test_pruned_by_another_process_while_it_is_restored(
    entry: Path, start: Restore, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    program = (
        "import sys; from pathlib import Path; from testbed.warm.store import Store;"
        " print(len(Store(Path(sys.argv[1])).prune(0)))"
    )
    act = getattr(restore, moment)

    def pruned(*words: Any, **more: Any) -> Any:
        command = [sys.executable, "-c", program, str(entry.parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "1\n"
        return act(*words, **more)

    monkeypatch.setattr(restore, moment, pruned)
    with start() as rack:
        assert not entry.exists()
        assert rack.node().agent.call("pci.tree")["devices"], "what it holds open stays"


def test_no_wait_is_of_the_clock_that_people_set(
    entry: Path, start: Restore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, jumps = time.time, itertools.cycle((YEAR_S, -YEAR_S))
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    with start() as rack:
        for _ in range(3):
            assert rack.node().agent.call("pci.tree")["devices"]
    assert entry.exists()


def test_without_its_listener_a_guest_is_lost_in_time_and_its_agent_serves_on(
    entry: Path, start: Restore
) -> None:
    with start() as rack:
        node = rack.node()
        assert node.link.run(END_LISTENER).stdout == b"2\n", "it, and one agent"
        assert node.agent.call("pci.tree")["devices"], "it was forked before"
        node.restart_agent()
        began_s = time.monotonic()
        with pytest.raises(LinkLost) as caught:
            _ = node.agent
        assert time.monotonic() - began_s < 35
        assert "host0" in caught.value.message
        assert "testbed: ready" in caught.value.console_tail
