# SPDX-License-Identifier: Apache-2.0
"""The command line with real racks: a round trip, and every way to interrupt it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.host.prepare import Installation
from testbed.rack import Rack

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

WORDS = [sys.executable, "-m", "testbed.cli"]


def command(*words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WORDS, *words], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def processes_of(run_dir: Path) -> list[str]:
    """QEMUs and keepers that name this folder in their command line, or work below it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            works_in = (process / "cwd").readlink()
        except OSError:
            continue
        if process.name != str(os.getpid()) and (
            str(run_dir) in words or str(run_dir) in str(works_in)
        ):
            found.append(words)
    return found


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime folder for one test's racks."""
    folder = Path(os.environ["TESTBED_RUNTIME_DIR"]) / f"p{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("TESTBED_RUNTIME_DIR", str(folder))
    return folder


def assert_nothing_left(runtime: Path) -> None:
    wait_until(lambda: not processes_of(runtime), "the machines are gone")
    # A command that was killed in the tenth of a second between taking a name and starting its
    # keeper leaves a folder that the next command removes (`.new-…` a minute later: it might
    # still be in the making).
    command("ps")
    assert not list((runtime / "racks").glob("[!.]*"))


def test_a_rack_is_used_by_one_command_after_another(rack: Rack, tmp_path: Path) -> None:
    rack.keeper.subscribe()
    listed = json.loads(command("ps", "--format", "json").stdout)
    assert [(r["name"], r["state"]) for r in listed["racks"]] == [("shared", "running")]
    assert command("topo", "shared").returncode == 0
    done = command("ssh", "shared/host0", "--", "echo said; exit 3")
    assert (done.returncode, done.stdout) == (3, "said\n")
    assert json.loads(command("qmp", "shared", "query-status").stdout)["running"]
    assert "testbed: ready" in command("logs", "shared").stdout
    inspected = json.loads(command("inspect", "shared").stdout)
    assert inspected["versions"]["qemu"]
    assert command("ssh", "shared/nosuch").returncode == 2
    assert command("qmp", "shared", "query-status", "[1]").returncode == 2


@pytest.mark.parametrize(
    ("is_started", "delay_s"),
    [(False, 0.3), (True, 0.0), (True, 1.0)],
    ids=["python starts", "before QEMU", "the guest boots"],
)
@pytest.mark.parametrize("verb", ["up", "run"])
def test_ctrl_c_at_any_stage_leaves_nothing(
    verb: str,
    is_started: bool,
    delay_s: float,
    installation: Installation,
    private: Path,
    tmp_path: Path,
) -> None:
    words = ["up", "minimal"] if verb == "up" else ["run", "-t", "minimal"]
    first_words = b"starting" if verb == "up" else b"run folder"
    with subprocess.Popen(
        [*WORDS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TESTBED_STATE_DIR": str(tmp_path)},
    ) as process:
        if is_started:
            assert process.stderr is not None
            assert any(first_words in line for line in process.stderr)
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    if is_started:  # before that, Python itself may still be starting
        assert process.returncode == 130, said.decode()
        assert b"Traceback" not in said
    assert_nothing_left(private)


def test_a_harness_that_is_killed_leaves_nothing(
    installation: Installation, private: Path, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [*WORDS, "run", "-t", "minimal"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TESTBED_STATE_DIR": str(tmp_path)},
    ) as process:
        wait_until(lambda: bool(processes_of(private)), "a machine runs")
        process.kill()
        process.wait(10)
    assert_nothing_left(private)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_is_said_and_leaves_nothing(
    installation: Installation, private: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "small", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("cannot mount here: " + mounted.stderr.decode().strip())
    try:
        done = command("run", "-t", "minimal", "--output", str(small / "run"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert done.returncode == 128
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert_nothing_left(private)
