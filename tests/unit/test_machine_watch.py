# SPDX-License-Identifier: Apache-2.0
"""Why a machine ended: every outcome of the race at its start, from values alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from testbed.errors import GuestPanic, LaunchError, LinkLost, NoHello
from testbed.machine import lifecycle
from testbed.machine.client import Exit
from testbed.machine.command import NodeCommand
from testbed.machine.console import Console
from testbed.machine.lifecycle import Watch

PANIC = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\n"
LOST = LinkLost("host0: the channel closed", node="host0")


class Machine:
    """A machine made of two files and an exit status."""

    def __init__(self, folder: Path) -> None:
        self.console_log = folder / "console.log"
        self.qemu_log = folder / "qemu.log"
        self.ended: Exit | None = None
        self.watch = Watch(
            NodeCommand("host0", ("qemu", "-M", "q35")),
            console=Console(self.console_log),
            qemu_log=self.qemu_log,
            exit_of=lambda: self.ended,
        )

    def end(self, status: int) -> None:
        self.ended = Exit("host0", status, time.time())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(lifecycle, "SETTLE_S", 0.05)
    return Machine(tmp_path)


def test_a_machine_that_lives(machine: Machine) -> None:
    machine.watch.check()
    machine.console_log.write_text("booting\ntestbed: ready\n")
    machine.watch.wait_ready(0)


def test_qemu_that_ends_at_once(machine: Machine) -> None:
    machine.qemu_log.write_text("qemu: -bad: invalid option\n")
    machine.end(1)
    with pytest.raises(LaunchError, match="host0: QEMU ended with status 1 before its") as caught:
        machine.watch.wait_ready(60)
    assert caught.value.exit_status == 1
    assert caught.value.command == ("qemu", "-M", "q35")
    assert caught.value.output == "qemu: -bad: invalid option"
    assert "invalid option" in str(caught.value)


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("status", [0, None])
def test_a_panic_is_a_panic_whatever_qemu_does(
    machine: Machine, answered: bool, status: int | None
) -> None:
    machine.console_log.write_text("Run /init\n" + PANIC)
    machine.watch.control_answered = answered
    if status is not None:
        machine.end(status)
    with pytest.raises(GuestPanic, match="panicked: Attempted to kill init!") as caught:
        machine.watch.wait_ready(60)
    assert caught.value.exit_status == status
    assert "Run /init" in str(caught.value)


def test_qemu_that_ends_later(machine: Machine) -> None:
    machine.watch.control_answered = True
    machine.console_log.write_text("Run /init\n")
    machine.qemu_log.write_text("qemu: terminating on signal 15\n")
    machine.end(-9)
    with pytest.raises(LinkLost, match="host0: QEMU was killed by SIGKILL") as caught:
        machine.watch.wait_ready(60)
    assert caught.value.exit_status == -9
    assert caught.value.console_tail == "Run /init"
    assert caught.value.hint == "QEMU said: qemu: terminating on signal 15"


def test_a_guest_that_is_never_ready(machine: Machine) -> None:
    machine.console_log.write_text("BUG: soft lockup - CPU#0 stuck for 26s!\nRun /init\n")
    with pytest.raises(NoHello, match=r"not ready within 0\.1 s") as caught:
        machine.watch.wait_ready(0.1)
    assert caught.value.console_tail.endswith("Run /init")
    assert caught.value.hint == "the guest kernel said: BUG: soft lockup - CPU#0 stuck for 26s!"


def test_a_full_disk_explains_silence(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "FULL_BYTES", 1 << 80)
    with pytest.raises(NoHello) as caught:
        machine.watch.wait_ready(0)
    assert caught.value.hint.startswith("the disk that holds ")


def test_the_blame_for_a_lost_link(machine: Machine) -> None:
    assert isinstance(machine.watch.blame(LOST), NoHello)
    machine.watch.control_answered = machine.watch.hello_seen = True
    machine.console_log.write_text("last words\n")
    error = machine.watch.blame(LOST)
    assert type(error) is LinkLost
    assert (error.message, error.console_tail) == (LOST.message, "last words")
    machine.end(1)
    assert "QEMU ended with status 1" in str(machine.watch.blame(LOST))
    with machine.console_log.open("a") as log:
        log.write(PANIC)
    assert isinstance(machine.watch.blame(LOST), GuestPanic)
