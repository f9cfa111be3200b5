# SPDX-License-Identifier: Apache-2.0
"""The model process: its specification, its sockets, its control, and every way to its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import ExitCode, InputError
from testbed.models import registers as hw
from testbed.models import wire
from testbed.models.spec import parse
from testbed.models.wire import Command

TIMEOUT_S = 20
MIB = 1 << 20
COMMAND = [sys.executable, "-m", "testbed.models.serve", "-"]


class Process:
    """A model process that serves, and its control socket."""

    def __init__(self, folder: Path, spec: dict[str, Any], *arguments: str, fds: Any = ()) -> None:
        self.folder = folder
        self.popen = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=fds,
            cwd=Path(__file__).parents[2],
        )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(json.dumps(spec).encode() + b"\n")
        self.popen.stdin.flush()
        self.first = json.loads(self.popen.stdout.readline() or "{}")
        self.pids: dict[str, int] = self.first.get("pids", {})

    def connect(self, name: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(self.folder / name))
        return connection

    def call(self, method: str, **params: Any) -> Any:
        with self.connect("control.sock") as connection, connection.makefile("rwb") as file:
            file.write(json.dumps({"id": 7, "method": method, "params": params}).encode() + b"\n")
            file.flush()
            answer = json.loads(file.readline())
            assert answer["id"] == 7
            if "error" in answer:
                raise InputError(answer["error"]["message"])
            return answer["result"]

    def end(self) -> tuple[int, str]:
        """Close its standard input, and wait: exit status and what it said."""
        _, error = self.popen.communicate(timeout=TIMEOUT_S)
        return self.popen.returncode, error.decode()


class Vfio:
    """A client of few words."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.call(Command.VERSION, wire.encode_version(0, 0, wire.OURS))

    def call(self, command: int, payload: bytes) -> bytes:
        self.socket.sendall(wire.encode_header(1, command, len(payload)) + payload)
        header = wire.HEADER.decode(self.receive(16))
        assert not header.flags & wire.HeaderFlag.ERROR
        return self.receive(header.size - 16)

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise ConnectionResetError
            data += part
        return data

    def read(self, offset: int) -> int:
        access = wire.REGION_ACCESS.encode(wire.RegionAccess(offset, 0, 4))
        return int.from_bytes(self.call(Command.REGION_READ, access)[-4:], "little")

    def write(self, offset: int, value: int) -> None:
        access = wire.REGION_ACCESS.encode(wire.RegionAccess(offset, 0, 4))
        self.call(Command.REGION_WRITE, access + value.to_bytes(4, "little"))


def memory(name: str, *, sealable: bool = True) -> int:
    fd = os.memfd_create(name, os.MFD_ALLOW_SEALING if sealable else 0)
    os.ftruncate(fd, MIB)
    os.set_inheritable(fd, True)
    return fd


def specification(folder: Path, fds: list[int]) -> dict[str, Any]:
    return {
        "control": str(folder / "control.sock"),
        "memories": [{"name": f"gpu{n}.vram", "fd": fd} for n, fd in enumerate(fds)],
        "devices": [
            {
                "name": f"gpu{n}",
                "kind": "gpu",
                "socket": str(folder / f"gpu{n}.vfu"),
                "memory": f"gpu{n}.vram",
                "links": [
                    {"peer": f"gpu{1 - n}", "socket": str(folder / "link"), "listens": n == 0}
                ],
            }
            for n in range(len(fds))
        ]
        + [
            {
                "name": "nic0",
                "kind": "nic",
                "socket": str(folder / "nic0.vfu"),
                "address": 1,
                "wire": str(folder / "nic0.wire"),
                "peers": {"2": str(folder / "nic1.wire")},
            }
        ],
    }


@contextmanager
def serving(folder: Path) -> Iterator[Process]:
    fds = [memory("one"), memory("two")]
    process = Process(folder, specification(folder, fds), fds=fds)
    for fd in fds:
        os.close(fd)
    yield process
    process.popen.kill()
    process.popen.communicate()
    wait_for(lambda: not any(map(runs, process.pids.values())))


def runs(pid: int) -> bool:
    """Not even a zombie, which a slow init leaves standing, counts as running."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    with serving(tmp_path) as process:
        yield process


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One for all that changes nothing."""
    with serving(tmp_path_factory.mktemp("models")) as process:
        yield process


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_ready_means_that_every_socket_is_there(process: Process) -> None:
    assert process.first == {"ready": True, "pids": process.pids}
    assert list(process.pids) == ["gpu0", "gpu1", "nic0"]
    assert all(Path(f"/proc/{pid}").is_dir() for pid in process.pids.values())
    assert names(process.folder) == {
        "control.sock", "gpu0.vfu", "gpu1.vfu", "nic0.vfu", "nic0.wire", "link",
    }  # fmt: skip
    for name, identity in (("gpu0", hw.GPU_IDENTITY), ("nic0", hw.NIC_IDENTITY)):
        with process.connect(f"{name}.vfu") as connection:
            assert Vfio(connection).read(hw.Common.IDENTITY) == identity


def test_the_links_of_one_node_come_up(process: Process) -> None:
    with process.connect("gpu0.vfu") as one, process.connect("gpu1.vfu") as two:
        gpus = [Vfio(one), Vfio(two)]
        deadline = time.monotonic() + TIMEOUT_S
        while {gpu.read(hw.LINK_BASE + hw.Link.STATE) for gpu in gpus} != {hw.LinkState.UP}:
            assert time.monotonic() < deadline
        assert process.call("link", device="gpu0", peer="gpu1", up=False)["state"] == "down"
        assert process.call("link", device="gpu0", peer="gpu1", latency_s=0.5) == {
            "state": "down", "width": 16, "bytes_per_s": 0.0, "latency_s": 0.5,
        }  # fmt: skip


def test_the_end_of_its_owner_is_its_end(process: Process) -> None:
    status, error = process.end()
    assert (status, error) == (0, "")
    assert names(process.folder) == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_in_good_order(process: Process, number: int) -> None:
    with process.connect("gpu0.vfu") as connection:
        client = Vfio(connection)
        process.popen.send_signal(number)
        process.popen.wait(TIMEOUT_S)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.read(0)
    assert process.popen.returncode == 0
    assert names(process.folder) == set()


HANGING = """
import time
from testbed.models.config import Bar, Identity
from testbed.models.device import Device

class Hanging(Device):
    identity = Identity(0x1234, 1, 0xFF0000)
    bars = (Bar(0, 4096),)

    def read(self, bar, offset, size):
        time.sleep(60)
"""


class TestDeath:
    """A machine does not survive a connection that is reset, so the connections live on."""

    def test_the_devices_answer_as_an_empty_slot_does(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as one, process.connect("nic0.vfu") as two:
            client, other = Vfio(one), Vfio(two)
            os.kill(process.pids["gpu0"], signal.SIGKILL)
            assert process.popen.stdout is not None
            # What is asked before the death is noticed is answered with an error.
            lost = json.loads(process.popen.stdout.readline())
            assert client.read(hw.Common.IDENTITY) == 0xFFFFFFFF
            client.write(hw.Common.CONTROL, 1)
            assert client.read(hw.Common.CONTROL) == 0xFFFFFFFF
            assert lost == {"lost": "gpu0", "status": 256 + signal.SIGKILL}
            assert other.read(hw.Common.IDENTITY) == hw.NIC_IDENTITY
            with pytest.raises(InputError, match="device 'gpu0' is lost: its model died"):
                process.call("counters", device="gpu0")
            devices = {item["device"]: item for item in process.call("devices")}
            assert devices["gpu0"]["lost"] == 256 + signal.SIGKILL
            assert devices["nic0"]["lost"] is None
            status, said = process.end()
        assert status == ExitCode.ERROR
        assert "device gpu0: its model died" in said
        assert names(process.folder) <= {"gpu0.vfu", "link"}

    def test_what_was_asked_before_is_answered(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as connection:
            client = Vfio(connection)
            os.kill(process.pids["gpu0"], signal.SIGSTOP)
            access = wire.REGION_ACCESS.encode(wire.RegionAccess(0, 0, 4))
            connection.sendall(wire.encode_header(5, Command.REGION_READ, 16) + access)
            os.kill(process.pids["gpu0"], signal.SIGKILL)
            answer = wire.HEADER.decode(client.receive(16))
            if answer.message_id != 5:  # it was stopped just after it had answered this one
                assert answer.size == 16
                answer = wire.HEADER.decode(client.receive(16))
            assert answer.message_id == 5
            assert client.receive(20)[-4:] == b"\xff" * 4

    @pytest.mark.parametrize("received", [0, 7, 16])
    def test_what_was_under_way_fails_at_once(self, tmp_path: Path, received: int) -> None:
        """Killed with a part of a read received, or while it is being answered."""
        (tmp_path / "card.py").write_text(HANGING)
        device = {"name": "mine", "socket": str(tmp_path / "mine.vfu")}
        device["kind"] = f"{tmp_path}/card.py:Hanging"
        spec = {"control": str(tmp_path / "control.sock"), "devices": [device]}
        process = Process(tmp_path, spec, "--trust")
        access = wire.REGION_ACCESS.encode(wire.RegionAccess(0, 0, 4))
        with process.connect("mine.vfu") as connection:
            client = Vfio(connection)
            connection.sendall(wire.encode_header(5, Command.REGION_READ, 16) + access[:received])
            time.sleep(0.3)  # until it hangs, or waits for the rest
            os.kill(process.pids["mine"], signal.SIGKILL)
            connection.sendall(access[received:])
            answer = wire.HEADER.decode(client.receive(16))
            assert answer.message_id == 5
            assert answer.flags & wire.HeaderFlag.ERROR
            assert answer.size == 16
            assert client.read(0) == 0xFFFFFFFF  # still in step
        process.end()

    def test_a_machine_that_has_gone_is_forgotten(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as connection:
            Vfio(connection)
        wait_for(lambda: not any(item["connected"] for item in process.call("devices")))
        os.kill(process.pids["gpu0"], signal.SIGKILL)
        assert process.popen.stdout is not None
        assert json.loads(process.popen.stdout.readline())["lost"] == "gpu0"

    def test_the_supervisor_s_death_is_the_models_end(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as connection:
            client = Vfio(connection)
            process.popen.kill()
            connection.settimeout(TIMEOUT_S)
            assert client.socket.recv(1) == b""
        wait_for(lambda: not any(map(runs, process.pids.values())))

    def test_bereaved_it_uses_no_cpu(self, process: Process) -> None:
        os.kill(process.pids["gpu0"], signal.SIGKILL)
        assert process.popen.stdout is not None
        process.popen.stdout.readline()
        before = ticks(process.popen.pid)
        time.sleep(0.5)
        assert ticks(process.popen.pid) == before


def test_idle_it_uses_no_cpu(process: Process) -> None:
    with process.connect("gpu0.vfu") as connection:
        Vfio(connection).read(0)
        time.sleep(0.3)
        pids = (process.popen.pid, *process.pids.values())
        before = [ticks(pid) for pid in pids]
        time.sleep(1.0)
        assert [ticks(pid) for pid in pids] == before


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().split()
    return int(fields[13]) + int(fields[14])


def test_a_second_machine_waits_for_the_first_to_go(process: Process) -> None:
    first = process.connect("gpu0.vfu")
    Vfio(first)
    with process.connect("gpu0.vfu") as second:
        second.sendall(wire.encode_header(1, Command.VERSION, 4) + bytes(4))
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.recv(1)
        first.close()
        second.settimeout(TIMEOUT_S)
        assert second.recv(16)


class TestControl:
    def test_devices(self, process: Process) -> None:
        with process.connect("gpu1.vfu") as connection:
            Vfio(connection)
            devices = {item["device"]: item for item in process.call("devices")}
        assert {name: item["connected"] for name, item in devices.items()} == {
            "gpu0": False,
            "gpu1": True,
            "nic0": False,
        }
        assert devices["gpu0"]["failure"] is None

    def test_witness(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as connection:
            client = Vfio(connection)
            client.write(hw.Common.DOORBELL_NOTIFY, 5)
            assert process.call("counters", device="gpu0")["events"]["doorbells"] == 1
            (last,) = process.call("trace", device="gpu0")[-1:]
            assert (last["what"], last["address"]) == ("doorbells", 5)
            assert process.call("trace", device="gpu0", after=last["sequence"]) == []
            process.call("reset_trace", device="gpu0")
            assert process.call("counters", device="gpu0")["events"]["doorbells"] == 0
            assert process.call("mappings", device="gpu0") == []

    def test_faults(self, process: Process) -> None:
        rule = {"name": "r", "action": "drop", "write": True}
        process.call("inject", device="gpu0", rule=rule)
        assert process.call("rules", device="gpu0") == [{"name": "r", "seen": 0, "struck": 0}]
        process.call("clear", device="gpu0", name="r")
        process.call("inject", device="gpu0", rule=rule)
        process.call("clear", device="gpu0")
        assert process.call("rules", device="gpu0") == []
        process.call("stick", device="gpu0", on=True)
        process.call("lose", device="gpu0", what="doorbell", count=1)
        process.call("lose", device="nic0", what="interrupt", count=2)
        with process.connect("gpu0.vfu") as connection:
            client = Vfio(connection)
            client.write(hw.Common.DOORBELL_NOTIFY, 5)
            assert client.read(hw.Common.NOTIFIED) == 0

    def test_surprise_removal(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as connection:
            client = Vfio(connection)
            process.call("remove", device="gpu0")
            assert client.read(0) == 0xFFFFFFFF
            with process.connect("gpu1.vfu") as other:
                assert Vfio(other).read(0) == hw.GPU_IDENTITY
        with process.connect("gpu0.vfu") as connection:  # plugged in again
            assert Vfio(connection).read(0) == hw.GPU_IDENTITY

    @pytest.mark.parametrize(
        ("method", "params", "words"),
        [
            ("explode", {}, "no method 'explode'"),
            ("__init__", {}, "no method"),
            ("counters", {}, "'device'"),
            ("counters", {"device": "gpu9"}, "no device 'gpu9'"),
            ("trace", {"device": "gpu0", "after": "x"}, "'after'"),
            ("inject", {"device": "gpu0"}, "a rule is an object"),
            ("clear", {"device": "gpu0", "name": "r"}, "no rule 'r'"),
            ("stick", {"device": "gpu0", "on": 1}, "'on'"),
            ("lose", {"device": "gpu0", "what": "hope", "count": 1}, "'what'"),
            ("lose", {"device": "gpu0", "what": "doorbell", "count": -1}, "'count'"),
            ("link", {"device": "nic0", "peer": "gpu0"}, "no links"),
            ("link", {"device": "gpu0", "peer": "gpu7"}, "no link to 'gpu7'"),
            ("link", {"device": "gpu0", "peer": "gpu1", "latency_s": -1}, "latency_s"),
            ("routes", {}, "'device'"),
            ("routes", {"device": "gpu9"}, "no device 'gpu9'"),
            ("routes", {"device": "gpu0"}, "names no machine"),
            ("tree", {}, "names no machine"),
            ("register", {"device": "gpu0", "bar": 0, "offset": 0}, "no method 'register'"),
            ("remove", {"device": "gpu0"}, "no machine has 'gpu0'"),
        ],
    )
    def test_what_cannot_be(
        self, untouched: Process, method: str, params: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(InputError, match=words):
            untouched.call(method, **params)

    @pytest.mark.parametrize(
        "line", [b"\n", b"[]\n", b"{\n", b'{"params": 1}\n', b"[" * 9999 + b"\n"]
    )
    def test_garbage_is_answered(self, untouched: Process, line: bytes) -> None:
        with untouched.connect("control.sock") as connection, connection.makefile("rwb") as file:
            file.write(line)
            file.flush()
            assert "error" in json.loads(file.readline())
            file.write(b'{"id": 1, "method": "devices"}\n')
            file.flush()
            assert len(json.loads(file.readline())["result"]) == 3


def refused(folder: Path, spec: object, *arguments: str, fds: Any = ()) -> tuple[int, str]:
    """Exit status and message of a process that does not even begin to serve."""
    text = spec if isinstance(spec, bytes) else json.dumps(spec).encode() + b"\n"
    done = subprocess.run(
        [*COMMAND, *arguments],
        input=text,
        capture_output=True,
        timeout=TIMEOUT_S,
        pass_fds=fds,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == b""
    assert names(folder) <= {"taken", "card.py"}
    return done.returncode, done.stderr.decode().strip()


class TestRefusal:
    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            (b"", "one line of JSON"),
            (b"nonsense\n", "no JSON"),
            (b"[]\n", "expected an object"),
            ({}, "'control'"),
            ({"control": "c"}, "'devices'"),
            ({"control": "c", "devices": [], "colour": 1}, "unknown entry 'colour'"),
            ({"control": "x" * 200, "devices": []}, "longer than 107"),
            ({"control": "c", "devices": [{"name": "n", "kind": "gpu"}]}, "'socket'"),
            ({"control": "c", "devices": [], "memories": [{"name": "m"}]}, "'fd' or 'path'"),
        ],
    )
    def test_specifications(self, tmp_path: Path, spec: object, words: str) -> None:
        status, said = refused(tmp_path, spec)
        assert status == ExitCode.BAD_INPUT
        assert words in said
        assert "\n" not in said

    def test_a_memory_that_is_none(self, tmp_path: Path) -> None:
        spec = specification(tmp_path, [])
        spec["memories"] = [{"name": "m", "fd": 77}]
        status, said = refused(tmp_path, spec)
        assert status == ExitCode.ERROR
        assert "memory 'm'" in said

    def test_a_memory_that_cannot_be_sealed(self, tmp_path: Path) -> None:
        fd = memory("m", sealable=False)
        spec = specification(tmp_path, [fd])
        status, said = refused(tmp_path, spec, fds=[fd])
        os.close(fd)
        assert status == ExitCode.ERROR
        assert "MFD_ALLOW_SEALING" in said

    def test_a_socket_that_is_taken(self, tmp_path: Path) -> None:
        spec = specification(tmp_path, [])
        (tmp_path / "taken").touch()
        spec["control"] = str(tmp_path / "taken")
        status, said = refused(tmp_path, spec)
        assert status == ExitCode.ERROR
        assert "could not be opened" in said


CARD = """
from testbed.models.config import Bar, Identity
from testbed.models.device import Device

class Card(Device):
    identity = Identity(0x1234, 1, 0x120000)
    bars = (Bar(0, 4096),)
    def __init__(self, name, answer=42):
        super().__init__(name)
        self.answer = answer
    def read(self, bar, offset, size):
        return self.answer

class NoDevice:
    pass
"""


class TestOwnDevice:
    def spec(self, folder: Path, kind: str, **options: object) -> dict[str, Any]:
        (folder / "card.py").write_text(CARD)
        device = {"name": "mine", "kind": kind, "socket": str(folder / "mine.vfu")}
        return {
            "control": str(folder / "control.sock"),
            "devices": [{**device, "options": options}],
        }

    def test_it_is_served(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path, f"{tmp_path / 'card.py'}:Card", answer=43)
        process = Process(tmp_path, spec, "--trust")
        with process.connect("mine.vfu") as connection:
            assert Vfio(connection).read(0) == 43
        assert process.end()[0] == 0

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("card.py:Nobody", "no device class 'Nobody'"),
            ("card.py:NoDevice", "no device class 'NoDevice'"),
            ("card.py", "no kind"),
            ("missing.py:Card", "No such file"),
            ("telephone", "no kind 'telephone'"),
        ],
    )
    def test_what_is_no_device(self, tmp_path: Path, kind: str, words: str) -> None:
        spec = self.spec(tmp_path, str(tmp_path / kind) if "." in kind else kind)
        status, said = refused(tmp_path, spec, "--trust")
        assert status == ExitCode.BAD_INPUT
        assert words in said

    def test_options_it_does_not_take(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path, f"{tmp_path / 'card.py'}:Card", colour="red")
        status, said = refused(tmp_path, spec, "--trust")
        assert status == ExitCode.BAD_INPUT
        assert "colour" in said

    def test_not_without_trust(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path, f"{tmp_path / 'card.py'}:Card")
        status, said = refused(tmp_path, spec)
        assert status == ExitCode.BAD_INPUT
        assert "--trust" in said


def test_names_are_used_once() -> None:
    device = {"name": "a", "kind": "nic", "socket": "a.vfu"}
    for other, words in (
        ({**device, "socket": "b.vfu"}, "device 'a'"),
        ({**device, "name": "b"}, "socket 'a.vfu'"),
    ):
        with pytest.raises(InputError, match=words):
            parse({"control": "c", "devices": [device, other]})
    with pytest.raises(InputError, match="no memory 'm'"):
        parse({"control": "c", "devices": [{**device, "memory": "m"}]})
    with pytest.raises(InputError, match="'peers'"):
        parse({"control": "c", "devices": [{**device, "peers": {"x": "y"}}]})
