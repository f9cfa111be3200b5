# SPDX-License-Identifier: Apache-2.0
"""Starts, stops and consoles of fake machines under a real keeper."""

from __future__ import annotations

import os
import pty
import select
import socket
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import AgentError, GuestPanic, LaunchError, LinkLost
from testbed.machine.console import Console
from testbed.machine.lifecycle import StopDeadlines, StoppedBy, Watch, stop_machine
from testbed.machine.qmp import Qmp
from testbed.machine.registry import reserve
from testbed.machine.spawn import Keeper, start_keeper
from testbed.machine.terminal import ConsoleEnd, attach_console
from tests.contract.machine_fakes import eventually, fake_qemu

QUICK = StopDeadlines(agent_s=0.3, acpi_s=0.3, quit_s=1, kill_s=5)
Start = Callable[..., tuple[Keeper, Watch]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    keepers = []
    run_folder = tmp_path / "run"
    run_folder.mkdir()

    def start_machine(**options: Any) -> tuple[Keeper, Watch]:
        command = fake_qemu(**options)
        keeper = start_keeper(reserve(tmp_path / "rt", "rack"), [command], run_folder=run_folder)
        keepers.append(keeper)
        watch = Watch(
            command,
            console=Console(run_folder / "host0/console.log"),
            qemu_log=run_folder / "host0/qemu.log",
            exit_of=lambda: keeper.exit_of("host0"),
        )
        return keeper, watch

    yield start_machine
    for keeper in keepers:
        keeper.close()


def connect(keeper: Keeper, watch: Watch) -> Qmp:
    path = keeper.folder / "host0/qmp.sock"
    return Qmp.connect(path, node="host0", timeout_s=20, check=watch.check)


def test_a_start(start: Start) -> None:
    keeper, watch = start(
        qmp=True, console=[[0, "booting\n"], [0.1, "testbed: "], [0.1, "ready\n"]]
    )
    with connect(keeper, watch):
        watch.control_answered = True
        watch.wait_ready(20)
    assert keeper.exit_of("host0") is None


def test_a_bad_argument_is_told_at_once(start: Start) -> None:
    keeper, watch = start(stderr="qemu: -foo: invalid option\n", exit=[0, 1])
    begun_s = time.monotonic()
    with pytest.raises(LaunchError, match="invalid option") as caught:
        connect(keeper, watch)
    assert time.monotonic() - begun_s < 5
    assert (caught.value.node, caught.value.exit_status) == ("host0", 1)


def test_a_panic_that_ends_qemu(start: Start) -> None:
    panic = "Kernel panic - not syncing: no init\n---[ end Kernel panic\n"
    keeper, watch = start(qmp=True, console=[[0.2, panic]], exit=[0, 0])

    def begin() -> None:
        with connect(keeper, watch):
            watch.control_answered = True
            watch.wait_ready(20)

    with pytest.raises(GuestPanic, match="no init") as caught:
        begin()
    assert caught.value.exit_status == 0
    assert caught.value.console_tail.endswith("---[ end Kernel panic")


def test_the_agent_stops_a_machine(start: Start) -> None:
    keeper, watch = start(qmp=True)
    given: list[float] = []

    def agent(timeout_s: float) -> None:
        given.append(timeout_s)
        keeper.stop("host0")
        raise LinkLost("the machine went away", node="host0")

    with connect(keeper, watch) as qmp:
        assert stop_machine(keeper, "host0", agent=agent, qmp=qmp) is StoppedBy.AGENT
    assert given == [StopDeadlines().agent_s]
    assert stop_machine(keeper, "host0") is StoppedBy.ALREADY


def test_acpi_stops_a_machine_whose_agent_cannot(start: Start) -> None:
    keeper, watch = start(qmp=True, acpi=True)

    def agent(_timeout_s: float) -> None:
        raise AgentError("no", remote_type="OSError")

    with connect(keeper, watch) as qmp:
        begun_s = time.monotonic()
        assert stop_machine(keeper, "host0", agent=agent, qmp=qmp) is StoppedBy.ACPI
        assert time.monotonic() - begun_s < StopDeadlines().agent_s


def test_quit_stops_a_guest_that_does_not_listen(start: Start) -> None:
    keeper, watch = start(qmp=True)
    with connect(keeper, watch) as qmp:
        stopped = stop_machine(
            keeper, "host0", agent=lambda _timeout_s: None, qmp=qmp, deadlines=QUICK
        )
        assert stopped is StoppedBy.QUIT


def test_kill_stops_everything(start: Start) -> None:
    keeper, watch = start(qmp=True)
    qmp = connect(keeper, watch)
    qmp.close()
    assert stop_machine(keeper, "host0", qmp=qmp, deadlines=QUICK) is StoppedBy.KILL


def test_a_step_can_be_left_out(start: Start) -> None:
    keeper, watch = start(qmp=True, acpi=True)
    with connect(keeper, watch) as qmp:
        deadlines = StopDeadlines(acpi_s=0)
        assert stop_machine(keeper, "host0", qmp=qmp, deadlines=deadlines) is StoppedBy.QUIT


class Terminal:
    """A person at a pseudo-terminal, attached to a machine that echoes with a prompt."""

    def __init__(self, folder: Path) -> None:
        self.person, self.tty = pty.openpty()
        self.path = folder / "console.sock"
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(self.path))
        self.server.listen()
        self.settings = termios.tcgetattr(self.tty)
        self.result: list[ConsoleEnd] = []
        self.thread = threading.Thread(target=self._attach)
        self.thread.start()
        self.machine, _ = self.server.accept()

    def _attach(self) -> None:
        self.result.append(attach_console(self.path, node="host0", stdin=self.tty, stdout=self.tty))

    def read(self, wanted: bytes) -> bytes:
        data = b""
        while wanted not in data and select.select([self.person], [], [], 5)[0]:
            data += os.read(self.person, 4096)
        return data

    def end(self) -> ConsoleEnd:
        self.thread.join(5)
        assert termios.tcgetattr(self.tty) == self.settings
        return self.result[0]

    def close(self) -> None:
        self.machine.close()
        self.server.close()
        self.thread.join(5)
        os.close(self.person)
        os.close(self.tty)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def raw(terminal: Terminal) -> bool:
    return not termios.tcgetattr(terminal.tty)[3] & (termios.ICANON | termios.ISIG | termios.ECHO)


def test_a_person_at_the_console(terminal: Terminal) -> None:
    assert eventually(lambda: raw(terminal))
    terminal.machine.sendall(b"login: ")
    assert terminal.read(b"login: ") == b"login: "
    os.write(terminal.person, b"root\x03")
    assert terminal.machine.recv(100) == b"root\x03"
    os.write(terminal.person, b"last\x1dnever")
    assert terminal.end() is ConsoleEnd.ESCAPE
    assert terminal.machine.recv(100) == b"last"
    assert terminal.machine.recv(100) == b""


def test_the_console_ends_with_the_machine(terminal: Terminal) -> None:
    assert eventually(lambda: raw(terminal))
    terminal.machine.sendall(b"bye")
    terminal.machine.close()
    assert terminal.read(b"bye") == b"bye"
    assert terminal.end() is ConsoleEnd.MACHINE


def test_a_script_at_the_console(tmp_path: Path) -> None:
    script, output = tmp_path / "script", tmp_path / "output"
    script.write_bytes(b"uname\n")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "console.sock"))
        server.listen()
        with script.open("rb") as stdin, output.open("wb") as stdout:
            end = attach_console(
                tmp_path / "console.sock",
                node="host0",
                stdin=stdin.fileno(),
                stdout=stdout.fileno(),
            )
        machine, _ = server.accept()
        with machine:
            assert machine.recv(100) == b"uname\n"
    assert end is ConsoleEnd.INPUT


def test_no_console(tmp_path: Path) -> None:
    with pytest.raises(LinkLost, match="host0: no console"):
        attach_console(tmp_path / "console.sock", node="host0")
