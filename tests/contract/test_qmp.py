# SPDX-License-Identifier: Apache-2.0
"""The QMP client against a fake QEMU: answers, refusals, events, silence, death."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import LaunchError, LinkLost, QmpError
from testbed.machine import transcript
from testbed.machine.qmp import MAX_EVENTS, Event, Qmp
from tests.contract.machine_fakes import eventually, fake_qemu, run_python

SILENT_EXIT = """
import sys
from pathlib import Path
from testbed.machine.qmp import Qmp
qmp = Qmp.connect(Path(sys.argv[1]), node="host0")
try:
    if sys.argv[2] == "dead":
        qmp.execute("hang-up")
except Exception as error:
    print(type(error).__name__)
sys.exit(5)
"""


class Fakes:
    """Fake QEMUs without a keeper, one folder each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Qmp] = []

    def start(self, node: str = "host0", **options: Any) -> Path:
        folder = self.folder / node
        folder.mkdir()
        argv = fake_qemu(node, qmp=True, **options).argv
        self.processes.append(subprocess.Popen(argv, cwd=folder))
        return folder / "qmp.sock"

    def connect(self, node: str = "host0", **options: Any) -> Qmp:
        path = self.start(node, **options)
        qmp = Qmp.connect(path, node=node, transcript=self.folder / "qmp.log")
        self.connections.append(qmp)
        return qmp


@pytest.fixture
def fakes(tmp_path: Path) -> Iterator[Fakes]:
    fakes = Fakes(tmp_path)
    yield fakes
    for connection in fakes.connections:
        connection.close()
    for process in fakes.processes:
        process.kill()
        process.wait()


def within(seconds: float, call: Callable[[], object], match: str) -> LinkLost:
    """It raises LinkLost, and not only at its own deadline."""
    begun_s = time.monotonic()
    with pytest.raises(LinkLost, match=match) as caught:
        call()
    assert time.monotonic() - begun_s < seconds
    assert caught.value.node == "host0"
    return caught.value


def test_commands_answers_and_refusals(fakes: Fakes) -> None:
    qmp = fakes.connect()
    assert qmp.version == "11.1.2"
    assert qmp.execute("echo", {"deep": [1, {"x": None}]}) == {"deep": [1, {"x": None}]}
    with pytest.raises(QmpError, match="host0: QEMU refused no-such-command: The comm") as caught:
        qmp.execute("no-such-command")
    assert caught.value.error_class == "CommandNotFound"
    assert caught.value.description == "The command has not been found"
    assert qmp.execute("echo") == {}
    assert not qmp.closed


def test_a_socket_that_comes_late(fakes: Fakes) -> None:
    assert fakes.connect(late_s=0.4).execute("echo", {"a": 1}) == {"a": 1}


def test_nobody_there(tmp_path: Path) -> None:
    call = lambda: Qmp.connect(tmp_path / "qmp.sock", node="host0", timeout_s=0.2)  # noqa: E731
    within(5, call, r"did not answer within 0\.2 s .*No such file")


def test_no_greeting(fakes: Fakes) -> None:
    path = fakes.start(mute=True)
    assert eventually(path.exists)
    call = lambda: Qmp.connect(path, node="host0", timeout_s=0.5)  # noqa: E731
    within(5, call, "no handshake; does another client hold it")


def test_qemu_that_ends_after_the_handshake(fakes: Fakes) -> None:
    path = fakes.start(fickle=True)
    assert eventually(path.exists)
    call = lambda: Qmp.connect(path, node="host0", timeout_s=0.5).execute("echo")  # noqa: E731
    within(5, call, "closed|did not answer")


def test_waiting_for_a_socket_ends_when_qemu_does(tmp_path: Path) -> None:
    death = LaunchError("gone", node="host0", exit_status=1, command=(), output="")

    def check() -> None:
        raise death

    with pytest.raises(LaunchError) as caught:
        Qmp.connect(tmp_path / "qmp.sock", node="host0", timeout_s=30, check=check)
    assert caught.value is death


def test_no_answer_in_time_and_then_business_as_usual(fakes: Fakes) -> None:
    qmp = fakes.connect()
    call = lambda: qmp.execute("hang", timeout_s=0.2)  # noqa: E731
    within(5, call, r"QEMU did not answer hang within 0\.2 s")
    assert qmp.execute("echo", {"a": 1}) == {"a": 1}


def test_death_during_a_call(fakes: Fakes) -> None:
    qmp = fakes.connect()
    call = lambda: qmp.execute("hang-up", timeout_s=60)  # noqa: E731
    within(5, call, r"closed during hang-up \(QEMU closed it\)")
    assert qmp.closed
    within(5, lambda: qmp.execute("echo"), "closed during echo")
    assert qmp.wait_closed(0)


def test_garbage_is_the_end(fakes: Fakes) -> None:
    qmp = fakes.connect()
    within(5, lambda: qmp.execute("babble", timeout_s=60), "closed during babble")


def test_events_are_collected(fakes: Fakes) -> None:
    qmp = fakes.connect()
    qmp.execute("noise")  # nobody listens yet
    with qmp.listen("NOISE") as noise, qmp.listen("OTHER") as other, qmp.listen() as everything:
        qmp.execute("noise")
        assert noise.get(5) == Event("NOISE", {"n": 0}, 7.5)
        assert noise.get(5, match=lambda event: event.data["n"] == 2).data == {"n": 2}
        assert noise.drain() == []
        assert len(everything.drain()) == 3
        within(5, lambda: other.get(0.1), r"no OTHER within 0\.1 s")
    qmp.execute("noise")
    assert noise.drain() == []


def test_events_nobody_fetches_are_bounded(fakes: Fakes) -> None:
    qmp = fakes.connect()
    with qmp.listen() as listener:
        listener.events.extend(Event("OLD", {}, 0) for _ in range(MAX_EVENTS))
        qmp.execute("noise")
        qmp.execute("echo")
        assert len(listener.events) == MAX_EVENTS
        assert listener.events[-1].data == {"n": 2}


def test_waiting_for_an_event_ends_with_the_connection(fakes: Fakes) -> None:
    qmp = fakes.connect()
    with qmp.listen("NEVER") as listener:
        threading.Timer(0.1, fakes.processes[0].kill).start()
        within(5, lambda: listener.get(60), "no NEVER: the connection closed")


def test_devices_come_and_go(fakes: Fakes) -> None:
    qmp = fakes.connect()
    qmp.device_add({"driver": "edu", "id": "edu0"})
    qmp.device_del("edu0", timeout_s=5)
    with pytest.raises(QmpError, match="the guest refused to let loved go"):
        qmp.device_del("loved", timeout_s=5)
    within(5, lambda: qmp.device_del("stuck", timeout_s=0.2), "no DEVICE_DELETED")


def test_several_machines_and_threads(fakes: Fakes) -> None:
    machines = [fakes.connect(f"host{number}") for number in range(3)]
    wrong: list[object] = []

    def talk(qmp: Qmp, thread: int) -> None:
        for number in range(30):
            said = {"from": qmp.node, "thread": thread, "number": number}
            if (heard := qmp.execute("echo", said)) != said:
                wrong.append(heard)

    threads = [threading.Thread(target=talk, args=(qmp, n)) for qmp in machines for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    fakes.processes[0].kill()
    assert machines[0].wait_closed(5)
    assert machines[1].execute("echo", {"still": "here"}) == {"still": "here"}


def test_quit_closes(fakes: Fakes) -> None:
    qmp = fakes.connect()
    within(5, lambda: qmp.execute("quit"), "closed during quit")
    assert fakes.processes[0].wait(5) == 0


def test_close_leaves_the_machine_alone_and_frees_the_socket(fakes: Fakes) -> None:
    qmp = fakes.connect()
    qmp.close()
    qmp.close()
    assert qmp.closed
    within(5, lambda: qmp.execute("echo"), "the testbed ended it|QEMU closed it")
    with Qmp.connect(fakes.folder / "host0/qmp.sock", node="host0") as again:
        assert again.execute("echo") == {}


def test_the_transcript(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MAX_ENTRY_CHARACTERS", 1000)
    qmp = fakes.connect()
    qmp.execute("echo", {"mark": 17})
    qmp.execute("echo", {"long": "x" * 2000})
    qmp.close()
    entries = list(map(json.loads, (fakes.folder / "qmp.log").read_text().splitlines()))
    assert [entry["way"] for entry in entries] == ["<", ">", "<", ">", "<", ">", "<"]
    assert entries[3]["message"]["arguments"] == {"mark": 17}
    assert entries[4]["message"]["return"] == {"mark": 17}
    assert entries[5]["cut"] > 2000
    assert len(entries[5]["text"]) == 1000


def test_the_transcript_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MAX_TRANSCRIPT_BYTES", 2000)
    log = transcript.Transcript(tmp_path / "qmp.log")
    for number in range(1000):
        log.write(">", {"execute": "echo", "id": str(number)})
    log.close()
    text = (tmp_path / "qmp.log").read_text()
    assert len(text) <= 2100
    assert json.loads(text.splitlines()[-1]) == {"cut": "the log is full"}


def test_a_transcript_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    for path in (tmp_path / "no/such/folder", Path("/dev/full")):
        log = transcript.Transcript(path)
        log.write(">", {"execute": "echo"})
        log.write(">", {"execute": "echo"})
        log.close()


@pytest.mark.parametrize("fate", ["dead", "open"])
def test_the_interpreters_end_is_silent(fakes: Fakes, fate: str) -> None:
    path = fakes.start()
    with run_python(SILENT_EXIT, str(path), fate) as process:
        output, errors = process.communicate(timeout=30)
    assert errors == ""
    assert output == ("LinkLost\n" if fate == "dead" else "")
    assert process.returncode == 5
