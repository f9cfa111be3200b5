# SPDX-License-Identifier: Apache-2.0
"""Saved machines and several processes: real ones, which save, look, prune, are killed at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from testbed.warm.store import MEMORY, Store

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60
KEY = "a"

# A harness that wants a machine; what makes it is a stand-in for the guest, and as long as a save.
HARNESS = f"""\
import mmap, os, sys, time
from pathlib import Path
from types import SimpleNamespace
from testbed.machine.command import NodeCommand
from testbed.topology import load, placement
from testbed.warm import memory, restore
from testbed.warm.store import MEMORY, STATE, Store

here, pieces, pause_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
topology = load.load(Path({str(ROOT)!r}) / "topologies" / "minimal.yaml", {{}})
wanted = SimpleNamespace(
    plan=placement.place(topology).nodes["host0"],
    spec=topology.nodes["host0"],
    key={KEY!r},
    restoring=lambda: NodeCommand("host0", ()),
)

def save(store, key, *_):
    with (here / "saves").open("a") as log:
        log.write(f"{{os.getpid()}}\\n")
    with store.making(key) as partial, mmap.mmap(-1, pieces << 20) as guest:
        guest.write(os.urandom(pieces << 20))
        runs = memory.pack(guest, partial / MEMORY)
        (partial / STATE).write_bytes(b"state")
        time.sleep(pause_s)
        store.describe(partial, runs, "host0")

restore.store = lambda: Store(here / "warm")
restore._save = save
(here / f"ready-{{os.getpid()}}").touch()
while not (here / "go").exists():
    time.sleep(0.01)
found = restore.ready({{"host0": wanted}}, here, 10.0, say=print)["host0"].snapshot
print(found.damage() or f"whole: {{found.memory_xxh3}}")
"""


@contextmanager
def harness(
    here: Path, *, pieces: int = 1, pause_s: float = 0.5, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """It runs, and is gone at the end."""
    words = [*before, sys.executable, "-c", HARNESS, str(here), str(pieces), str(pause_s)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def said(process: subprocess.Popen[str]) -> str:
    """What it printed, when it has ended well."""
    out, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    return out


def await_that(what: str, path: Path, pattern: str, number: int = 1) -> None:
    limit_s = time.monotonic() + DEADLINE_S
    while len(list(path.glob(pattern))) < number:
        assert time.monotonic() < limit_s, f"not in time: {what}"
        time.sleep(0.01)


def test_three_processes_that_want_one_machine_save_it_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        every = [stack.enter_context(harness(tmp_path)) for _ in range(3)]
        await_that("all are ready", tmp_path, "ready-*", 3)
        (tmp_path / "go").touch()
        told, words = zip(*[said(process).splitlines() for process in every], strict=True)
    assert len((tmp_path / "saves").read_text().split()) == 1
    assert len(set(words)) == 1
    assert sorted(told) == [
        *["host0: another testbed boots and saves it"] * 2,
        "host0: booting once, to be saved",
    ]
    assert words[0].startswith("whole: ")
    assert sorted(path.name for path in (tmp_path / "warm").iterdir()) == [KEY, f"{KEY}.lock"]


def test_killed_while_it_saves_it_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    store = Store(tmp_path / "warm")
    with harness(tmp_path, pause_s=DEADLINE_S) as first:
        await_that("it has written the memory", store.folder, f".{KEY}.*/{MEMORY}")
        os.kill(first.pid, signal.SIGKILL)
        first.wait(DEADLINE_S)
    assert store.find(KEY) is None
    assert store.kept() == []
    began_s = time.monotonic()
    with harness(tmp_path, pause_s=0) as second:
        assert "\nwhole: " in said(second)
    assert time.monotonic() - began_s < DEADLINE_S / 2, "nobody waits for the dead"
    assert sorted(path.name for path in store.folder.iterdir()) == [KEY, f"{KEY}.lock"]


def test_a_disk_that_fills_while_it_is_saved(tmp_path: Path) -> None:
    """A file system with room for half of it, in a mount namespace of the process's own."""
    (tmp_path / "go").touch()
    (tmp_path / "warm").mkdir()
    script = 'mount -t tmpfs -o size=1m disk "$1" && shift && "$@"; echo "$?"; find "$0" -type f'
    before = ["unshare", "-rm", "sh", "-c", script, tmp_path / "warm", tmp_path / "warm"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*map(str, before), "true"], capture_output=True, check=False).stdout
        != b"0\n"
    ):
        pytest.skip("a user may make no mount namespace here")
    with harness(tmp_path, pieces=2, before=list(map(str, before))) as process:
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert "SetupError" in errors.splitlines()[-1]
    assert "No space left on device" in errors.splitlines()[-1]
    assert out.split() == ["host0:", "booting", "once,", "to", "be", "saved", "1", lock(tmp_path)]


def lock(here: Path) -> str:
    return str(here / "warm" / f"{KEY}.lock")


# Makes and looks at one entry again and again, and counts what it finds.
CHURN = f"""\
import sys
from collections import Counter
from pathlib import Path
from testbed.warm import memory
from testbed.warm.store import MEMORY, STATE, Store

store, seen = Store(Path(sys.argv[1])), Counter()
for _ in range(300):
    with store.exclusive({KEY!r}):
        if store.find({KEY!r}) is None:
            with store.making({KEY!r}) as partial:
                runs = memory.pack(b"x" * (1 << 16), partial / MEMORY)
                (partial / STATE).write_bytes(b"state")
                store.describe(partial, runs, "host0")
    found = store.find({KEY!r})
    seen["whole" if found and not found.damage() else "half" if found else "gone"] += 1
print(dict(seen))
"""
PRUNE = """\
import sys
from pathlib import Path
from testbed.warm.store import Store
while True:
    Store(Path(sys.argv[1])).prune(0)
"""


def test_one_that_is_pruned_again_and_again_disturbs_nobody(tmp_path: Path) -> None:
    def program(text: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", text, str(tmp_path / "warm")]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    (tmp_path / "warm").mkdir()
    with ExitStack() as stack:
        pruners = [program(PRUNE) for _ in range(2)]
        for pruner in pruners:
            stack.callback(pruner.communicate, timeout=DEADLINE_S)
            stack.callback(pruner.kill)
        seen = said(program(CHURN))
        for pruner in pruners:
            assert pruner.poll() is None, pruner.communicate(timeout=DEADLINE_S)[1]
    assert "gone" in seen, "they met"
    assert "half" not in seen
