# SPDX-License-Identifier: Apache-2.0
"""Who makes agents in a guest: an agent for each connection, and who a saved machine becomes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.guest.agent import AgentClient

ROOT = Path(__file__).parents[2]
DEADLINE_S = 20.0

# The listener on ports of this test's, with a machine's doings left out.
LISTENER = """
import os, random, sys
sys.path.insert(0, sys.argv[1])
from guest_agent import listener, resume
from guest_agent.hw import config_state
listener.ADDRESS = "127.0.0.1"
listener.AGENT_PORT, listener.SSH_PORT = int(sys.argv[2]), int(sys.argv[3])
listener.SSH_SERVER = ("cat",)
for name in ("clear_free_memory", "load_modules"):
    setattr(resume, name, lambda *_: None)
resume.PCI = os.environ.get("TESTED_PCI", "/nowhere")
config_state.PCI = resume.PCI + "/devices"
resume.fcntl.ioctl = lambda _, number, *what: print(f"ioctl {number:#x} {what}", flush=True)
random.seed = lambda: print(f"{os.getpid()} is seeded", flush=True)
resume.time.clock_settime = lambda _, time_s: print(f"it is {time_s:.1f}", flush=True)
resume.os.makedirs = lambda *_, **__: None
resume.write = lambda path, data: print(f"{path}: {data!r}", flush=True)
for name in ("RANDOM", "HOST_NAME", "NAME_FILE", "HOST_KEY", "AUTHORIZED", "DISKS_FILE"):
    setattr(resume, name, f"{os.environ['TESTED_OWN']}/{name}")
first_agent = resume.first_agent
def slowly():
    resume.time.sleep(0.2)
    print("the first agent is made", flush=True)
    if "TESTED_DEATH" in os.environ:
        os._exit(3)
    return first_agent()
resume.first_agent = slowly
sys.exit(listener.run("cafe" * 4, sys.argv[4:]))
"""


class Listener:
    """One such process; what it said is in ``log``."""

    def __init__(self, log: Path, *words: str) -> None:
        self.log = log
        self.own = log.parent / "own"
        self.own.mkdir(exist_ok=True)
        with socket.socket() as one, socket.socket() as two:
            for each in (one, two):
                each.bind(("127.0.0.1", 0))
            self.agents, self.shells = one.getsockname()[1], two.getsockname()[1]
        with log.open("wb") as out:
            done = subprocess.run(
                [sys.executable, "-c", LISTENER, ROOT, str(self.agents), str(self.shells), *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=DEADLINE_S,
                check=False,
                env={**os.environ, "TESTED_OWN": str(self.own)},
            )
        assert done.returncode == 0, log.read_text()

    def wire(self, port: int) -> socket.socket:
        """A connection to it."""
        return socket.create_connection(("127.0.0.1", port), DEADLINE_S)

    def agent(self) -> AgentClient:
        """An agent of its."""
        return AgentClient("test", self.wire(self.agents))

    def await_said(self, word: str) -> None:
        """Wait until it has said ``word``."""
        deadline_s = time.monotonic() + DEADLINE_S
        while word not in self.log.read_text():
            assert time.monotonic() < deadline_s, self.log.read_text()
            time.sleep(0.02)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Listener]]:
    """Listeners that a test started; they are ended by their agents' parent."""
    made: list[Listener] = []
    yield made
    for each in made:
        with each.wire(each.agents) as wire:
            hello = line_of(wire)["hello"]
            parent = Path(f"/proc/{hello['pid']}/stat").read_text().rpartition(")")[2].split()[1]
        os.kill(int(parent), signal.SIGKILL)


def listen(started: list[Listener], log: Path, *words: str) -> Listener:
    """Start one, to be ended after the test."""
    one = Listener(log, *words)
    started.append(one)
    return one


def line_of(wire: socket.socket) -> Any:
    """The next line from there, of JSON."""
    with wire.makefile() as stream:
        return json.loads(stream.readline())


def gone(pid: int) -> bool:
    """The process ended and nobody has to reap it."""
    deadline_s = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def test_each_connection_is_an_agent_of_its_own(started: list[Listener], tmp_path: Path) -> None:
    listener = listen(started, tmp_path / "log")
    listener.await_said("testbed: ready")
    one, two = listener.agent(), listener.agent()
    pids = [agent.hello["pid"] for agent in (one, two)]
    assert pids[0] != pids[1]
    assert {agent.hello["agent"] for agent in (one, two)} == {"cafe" * 4}
    one.call("memory.alloc", name="mine", size_bytes=4096)
    two.call("memory.alloc", name="mine", size_bytes=4096)  # it has no such buffer yet
    os.kill(pids[0], signal.SIGKILL)
    assert gone(pids[0])
    one.close()
    assert two.call("system.info")["machine"]
    two.close()
    assert gone(pids[1])


def test_the_other_port_is_the_ssh_servers(started: list[Listener], tmp_path: Path) -> None:
    listener = listen(started, tmp_path / "log")
    with listener.wire(listener.shells) as wire:
        wire.sendall(b"SSH-2.0-test\n")
        assert wire.recv(100) == b"SSH-2.0-test\n"


def message(text: bytes) -> bytes:
    """As the host sends it."""
    return b"%06d%s" % (len(text), text)


IDENTITY = message(b"ZW50cm9weQ== 1234.5 host7 a2V5 ssh-ed25519 AAAA of a rack disks")
FUNCTION = "0000:02:00.0"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An NVMe function with its driver and addresses, and no disk yet."""
    folder = tmp_path / "pci" / "devices" / FUNCTION
    (folder / "nvme" / "nvme0").mkdir(parents=True)
    (folder / "driver").symlink_to("../../drivers/nvme")
    (folder / "class").write_text("0x010802\n")
    header = b"\x36\x1b\x10\x00\x06\x04" + bytes(10) + b"\x0c\0\0\x40"
    (folder / "config").write_bytes(header.ljust(4096, b"\0"))
    monkeypatch.setenv("TESTED_PCI", str(tmp_path / "pci"))
    return folder


def test_its_devices_are_in_place_at_its_hello_and_its_disks_before_its_first_call(
    started: list[Listener], tmp_path: Path, disk: Path
) -> None:
    listener = listen(started, tmp_path / "log", "saved", FUNCTION)
    listener.await_said("testbed: waiting")
    assert f"drivers/nvme/unbind: b'{FUNCTION}'" in listener.log.read_text()
    kept = (disk / "config").read_bytes()
    (disk / "config").write_bytes(kept[:4] + bytes(4092))  # as a reset leaves it
    with listener.wire(listener.agents) as wire:
        assert line_of(wire)["hello"]
        assert (disk / "config").read_bytes() == kept
        wire.sendall(IDENTITY + b'{"id": 1, "method": "system.info", "params": {}}\n')
        listener.await_said(f"drivers/nvme/bind: b'{FUNCTION}'")
        wire.settimeout(0.3)
        with pytest.raises(TimeoutError):
            wire.recv(1)
        wire.settimeout(DEADLINE_S)
        (disk / "nvme" / "nvme0" / "nvme0n1").mkdir()
        assert line_of(wire)["result"]["machine"]


def test_disks_that_nobody_will_look_at_get_no_driver(
    started: list[Listener], tmp_path: Path, disk: Path
) -> None:
    listener = listen(started, tmp_path / "log", "saved", FUNCTION)
    listener.await_said("testbed: waiting")
    told = message(b"ZW50cm9weQ== 1234.5 host7 a2V5 ssh-ed25519 AAAA of a rack without_disks")
    with listener.wire(listener.agents) as wire:
        assert line_of(wire)["hello"]
        wire.sendall(told + b'{"id": 1, "method": "system.info", "params": {}}\n')
        assert line_of(wire)["result"]["machine"], "it waits for no disk"
    assert "drivers/nvme/bind" not in listener.log.read_text()
    assert (listener.own / "DISKS_FILE").read_bytes() == b"without_disks"
    assert not list((disk / "nvme" / "nvme0").iterdir())


def test_a_machine_waits_when_its_first_agent_does(started: list[Listener], tmp_path: Path) -> None:
    listener = listen(started, tmp_path / "log", "saved")
    listener.await_said("testbed: waiting")
    said = listener.log.read_text()
    assert said.index("the first agent is made") < said.index("testbed: waiting")
    with listener.wire(listener.agents) as wire:
        wire.sendall(IDENTITY)
        listener.await_said("testbed: ready")


def test_a_machine_whose_first_agent_is_gone_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTED_DEATH", "1")
    listener = Listener(tmp_path / "log", "saved")  # it ends by itself
    listener.await_said("testbed: unfit")
    assert "waiting" not in listener.log.read_text()


def test_another_device_in_its_place_is_not_its_own(tmp_path: Path, disk: Path) -> None:
    listener = Listener(tmp_path / "log", "saved", FUNCTION)  # it ends by itself
    listener.await_said("testbed: waiting")
    with (disk / "config").open("r+b") as config:
        config.write(b"\x37")
    with listener.wire(listener.agents) as wire:
        assert line_of(wire)["unfit"].startswith(f"{FUNCTION}: its register 0x00 is 0x00101b37")


def test_no_process_of_a_saved_machine_has_the_random_numbers_of_another(
    started: list[Listener], tmp_path: Path
) -> None:
    listener = listen(started, tmp_path / "log", "saved")
    listener.await_said("testbed: waiting")
    assert "ioctl" not in listener.log.read_text()
    with listener.wire(listener.agents) as wire:
        first = line_of(wire)["hello"]["pid"]
        wire.sendall(IDENTITY)
        listener.await_said("testbed: ready")
        pool = [line for line in listener.log.read_text().splitlines() if "ioctl" in line]
        assert "0x40085203" in pool[0], "RNDADDENTROPY"
        assert "entropy" in pool[0]
        assert "0x5207" in pool[1], "RNDRESEEDCRNG"
    seeded = [line for line in listener.log.read_text().splitlines() if "is seeded" in line]
    assert len(set(seeded)) == 2
    assert f"{first} is seeded" in seeded


def test_a_saved_machine_becomes_what_it_is_told(started: list[Listener], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "HOST_KEY").write_bytes(b"the image's, and longer")
    listener = listen(started, tmp_path / "log", "saved")
    listener.await_said("testbed: waiting")
    assert "ready" not in listener.log.read_text()
    with listener.wire(listener.agents) as wire:
        hello = line_of(wire)
        assert hello["hello"]["agent"] == "cafe" * 4
        assert "ready" not in listener.log.read_text()
        wire.sendall(IDENTITY + b'{"id": 1, "method": "system.info", "params": {}}\n')
        assert line_of(wire)["result"]["machine"], "a call may be behind it"
        listener.await_said("testbed: ready")
    assert "it is 1234.5" in listener.log.read_text()
    assert {path.name: path.read_bytes() for path in listener.own.iterdir()} == {
        "RANDOM": b"",
        "HOST_NAME": b"host7",
        "NAME_FILE": b"host7\n",
        "HOST_KEY": b"key",
        "AUTHORIZED": b"ssh-ed25519 AAAA of a rack\n",
        "DISKS_FILE": b"disks",
    }
    with contextlib.closing(listener.agent()) as ordinary:
        assert ordinary.call("system.info")["machine"]


def test_others_are_served_after_the_first_agent_has_settled(
    started: list[Listener], tmp_path: Path
) -> None:
    listener = listen(started, tmp_path / "log", "saved")
    with listener.wire(listener.agents) as first, listener.wire(listener.agents) as second:
        one = line_of(first)["hello"]["pid"]
        second.settimeout(0.3)
        with pytest.raises(TimeoutError):
            second.recv(1)
        second.settimeout(DEADLINE_S)
        first.sendall(IDENTITY)
        assert line_of(second)["hello"]["pid"] != one


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (message(b""), "ValueError"),
        (message(b"ZW50cm9weQ== 1 host7 a2V5 key"), "b'key' says nothing of disks"),
        (b"nosize", "ValueError"),
        (message(b"ZW50cm9weQ== now host7 a2V5 key disks"), "ValueError"),
        (message(b"a 1 host7 a2V5 key disks"), "Error: Invalid base64"),
        (IDENTITY[:20], "EOFError: the host went away"),
    ],
)
def test_a_machine_that_cannot_become_it_says_why_and_serves_nobody(
    tmp_path: Path, said: bytes, why: str
) -> None:
    listener = Listener(tmp_path / "log", "saved")  # it ends by itself
    with listener.wire(listener.agents) as wire:
        assert line_of(wire)["hello"]
        wire.sendall(said)
        wire.shutdown(socket.SHUT_WR)
        assert wire.recv(1) == b"", "its end is the agent's"
    listener.await_said("testbed: unfit")
    assert "ready" not in listener.log.read_text()
    assert why in listener.log.read_text()
    assert not (listener.own / "HOST_KEY").read_bytes()
    assert not (listener.own / "AUTHORIZED").read_bytes()


def test_a_function_that_is_not_there_cannot_be_saved(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "log", "saved", "0000:ff:1f.7")  # it ends by itself
    listener.await_said("testbed: unfit: FileNotFoundError")
    assert "0000:ff:1f.7" in listener.log.read_text()
