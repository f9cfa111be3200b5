# SPDX-License-Identifier: Apache-2.0
"""The agent as a process: what goes over its stdin and stdout, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest_agent.pattern import pattern

ROOT = Path(__file__).parents[2]
MAIN = ROOT / "guest_agent" / "__main__.py"

# An agent with methods that misbehave, and something of the host's to give back.
MISBEHAVING = """
from __future__ import annotations
import os, sys, time
sys.path.insert(0, sys.argv[1])
from guest_agent import agent, channel

class Held:
    def __init__(self, name, fails):
        self.name, self.fails, self.devices = name, fails, {}
    def close(self):
        print("gave back", self.name, file=sys.stderr, flush=True)
        if self.fails:
            raise OSError(5, "stuck")
        return []

@agent.registry.method("test.hold")
def hold(self, *, name: str, fails: bool = False):
    self._containers[self._number()] = Held(name, fails)

@agent.registry.method("test.shout")
def shout(self):
    print("a stray print", flush=True)
    os.write(1, b"a stray write\\n")
    os.system("echo a stray child")
    return "quiet"

@agent.registry.method("test.sleep")
def sleep(self, *, seconds: float):
    time.sleep(seconds)

@agent.registry.method("test.result")
def result(self, *, size_bytes: int):
    return "x" * size_bytes

@agent.registry.method("test.unspeakable")
def unspeakable(self):
    return {1, 2}

@agent.registry.method("test.modules")
def modules(self):
    return sorted(sys.modules)

sys.exit(channel.run("dev"))
"""


class Process:
    """One agent, spoken to in lines."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self.stdin, self.stdout = process.stdin, process.stdout
        self.hello = self.read()["hello"]

    def read(self) -> dict[str, Any]:
        message = json.loads(self.stdout.readline())
        assert isinstance(message, dict)
        return message

    def raw(self, line: bytes) -> dict[str, Any]:
        self.stdin.write(line + b"\n")
        self.stdin.flush()
        return self.read()

    def ask(self, method: str, **params: object) -> dict[str, Any]:
        return self.raw(json.dumps({"id": 7, "method": method, "params": params}).encode())

    def result(self, method: str, **params: object) -> Any:
        answer = self.ask(method, **params)
        assert answer.keys() == {"id", "result"}, answer
        assert answer["id"] == 7
        return answer["result"]

    def error(self, method: str, **params: object) -> dict[str, Any]:
        answer = self.ask(method, **params)
        assert answer.keys() == {"id", "error"}, answer
        assert answer["error"].keys() == {"type", "message", "errno", "where"}
        error = answer["error"]
        assert isinstance(error, dict)
        return error

    def end(self) -> tuple[int, bytes, str]:
        """Close its stdin: (exit status, what else came on stdout, stderr)."""
        out, err = self.process.communicate(timeout=10)
        return self.process.returncode, out, err.decode()


@pytest.fixture(scope="module")
def agent() -> Iterator[Process]:
    yield from _run(str(MAIN))


@pytest.fixture
def misbehaving() -> Iterator[Process]:
    yield from _run("-c", MISBEHAVING, str(ROOT))


def _run(*argv: str) -> Iterator[Process]:
    with subprocess.Popen(
        [sys.executable, "-ISu", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


def test_says_hello_first(agent: Process) -> None:
    assert agent.hello == {
        "protocol": 1,
        "agent": "dev",
        "kernel": os.uname().release,
        "pid": agent.process.pid,
    }


def test_its_hash_is_the_name_of_the_folder_it_was_shipped_in(tmp_path: Path) -> None:
    folder = tmp_path / "0123456789abcdef"
    folder.mkdir()
    (folder / "guest_agent").symlink_to(ROOT / "guest_agent")
    for process in _run(str(folder / "guest_agent" / "__main__.py")):
        assert process.hello["agent"] == "0123456789abcdef"


def test_answers_in_order(agent: Process) -> None:
    lines = [{"id": n, "method": "memory.free", "params": {"name": str(n)}} for n in range(5)]
    agent.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    agent.stdin.flush()
    assert [agent.read()["id"] for _ in lines] == [0, 1, 2, 3, 4]


def test_a_line_may_come_in_pieces(agent: Process) -> None:
    for piece in (b'{"id": 3, "meth', b'od": "iommu.groups"', b"}\n"):
        agent.stdin.write(piece)
        agent.stdin.flush()
    assert agent.read()["id"] == 3


def test_describes_the_machine(agent: Process) -> None:
    info = agent.result("system.info")
    assert info["kernel"] == os.uname().release
    assert info["memory_bytes"] > 1 << 20
    assert info["iommu"]["mode"] in {"off", "strict", "lazy", "passthrough", "mixed"}


def test_memory_is_filled_summed_read_and_written(agent: Process) -> None:
    agent.result("memory.alloc", name="a", size_bytes=8192)
    target = {"ram": "a"}
    agent.result("memory.fill", target=target, offset=16, size_bytes=5000, seed=9)
    expected = bytes(16) + pattern(9, 0, 5000) + bytes(8192 - 5016)
    read = agent.result("memory.read", target=target, offset=0, size_bytes=8192)
    assert bytes.fromhex(read["hex"]) == expected
    sums = agent.result("memory.checksum", target=target, offset=0, size_bytes=8192)
    assert sums["crc32"] == zlib.crc32(expected)
    agent.result("memory.write", target=target, offset=1, hex="0aff")
    assert agent.result("memory.read", target=target, offset=0, size_bytes=4)["hex"] == "000aff00"
    agent.result("memory.free", name="a")
    assert "'a'" in agent.error("memory.free", name="a")["message"]


@pytest.mark.parametrize(
    ("method", "params", "named"),
    [
        ("memory.alloc", {"name": "a"}, "size_bytes: missing"),
        ("memory.alloc", {"name": "a", "size_bytes": "4096"}, "size_bytes: expected an integer"),
        ("memory.alloc", {"name": "a", "size_bytes": True}, "size_bytes: expected an integer"),
        ("memory.alloc", {"name": "a", "size_bytes": -4096}, "size_bytes: expected an integer"),
        ("memory.alloc", {"name": "a", "size_bytes": 100}, "size_bytes: 100"),
        ("memory.alloc", {"name": 3, "size_bytes": 4096}, "name: expected a string"),
        ("memory.alloc", {"name": "a", "size_bytes": 1, "colour": 1}, "'colour': unknown"),
        ("pci.tree", {"root": "/etc"}, "'root': unknown"),
        ("vfio.open", {"devices": "0000:00:00.0"}, "devices: expected a list of strings"),
        ("vfio.open", {"devices": []}, "devices: name at least one"),
        ("vfio.map", {"container": 1, "iova": 0, "size_bytes": 1, "source": {}}, "container: 1"),
        ("memory.read", {"target": {}, "size_bytes": 4}, "target.bar: missing"),
        ("memory.read", {"target": {"ram": "a", "x": 1}, "size_bytes": 4}, "target.x: unknown"),
        ("memory.read", {"target": {"bar": "b", "index": "2"}, "size_bytes": 4}, "target.index"),
        ("memory.write", {"target": {"ram": "a"}, "hex": "xyz"}, "hex: "),
        ("engine.copy", {"engine": 9, "source_iova": 0, "target_iova": 0, "size_bytes": 1}, "9"),
        ("engine.open", {"device": "x", "kind": "gpu"}, "kind: 'gpu'"),
        ("engine.storm", {"engine": 1, "iova": 0, "count": 1, "access": "x"}, "access: 'x'"),
        ("irq.wait", {"device": "x", "timeout_s": 1e9}, "timeout_s: at most"),
        ("faults.mark", {"reports": 4}, "reports: 1 to 3"),
    ],
)
def test_a_wrong_parameter_is_named(
    agent: Process, method: str, params: dict[str, Any], named: str
) -> None:
    error = agent.error(method, **params)
    assert error["type"] == "ParameterError"
    assert named in error["message"]


def test_an_unknown_method_is_refused(agent: Process) -> None:
    error = agent.error("os.system", command="true")
    assert (error["type"], error["errno"]) == ("UnknownMethodError", None)
    assert "os.system" in error["message"]


def test_an_os_error_carries_its_number_and_place(agent: Process) -> None:
    error = agent.error("vfio.open", devices=["ffff:ff:1f.7"])
    assert error["type"] == "OSError"
    assert error["errno"] == 19
    assert error["where"].startswith("vfio.py:")
    assert error["where"].endswith(" _open")


GARBAGE = [
    b"",
    b"hello?",
    b"\xff\xfe\x00",
    b"[1, 2]",
    b"17",
    b"null",
    b'{"method": "pci.tree"}',
    b'{"id": "1", "method": "pci.tree"}',
    b'{"id": -1, "method": "pci.tree"}',
    b'{"id": 1, "method": 5}',
    b'{"id": 1}',
    b'{"id": 1, "method": "pci.tree", "params": []}',
    b'{"id": 1, "method": "pci.tree", "param": {}}',
    b'{"id": NaN, "method": "pci.tree"}',
    b"[" * 100_000,
    b'{"id": 1' + b"0" * 10_000 + b"}",
]


@pytest.mark.parametrize("line", GARBAGE, ids=lambda line: line[:24].decode(errors="replace"))
def test_garbage_is_answered_and_survived(agent: Process, line: bytes) -> None:
    answer = agent.raw(line)
    assert answer["error"]["type"] == "ProtocolError"
    assert agent.ask("iommu.groups")["id"] == 7


def test_a_huge_line_is_dropped_without_being_kept(misbehaving: Process) -> None:
    agent = misbehaving
    piece = b"x" * (1 << 20)
    for _ in range(200):
        agent.stdin.write(piece)
    answer = agent.raw(b"")
    assert answer["error"]["type"] == "ProtocolError"
    assert "longer than" in answer["error"]["message"]
    assert agent.ask("iommu.groups")["id"] == 7
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    assert peak_kib < 150 << 10


def test_nothing_but_the_protocol_on_stdout(misbehaving: Process) -> None:
    assert misbehaving.result("test.shout") == "quiet"
    status, out, err = misbehaving.end()
    assert (status, out) == (0, b"")
    assert [line for line in err.splitlines() if "stray" in line] == [
        "a stray print",
        "a stray write",
        "a stray child",
    ]


def test_a_result_that_cannot_be_sent_is_an_error(misbehaving: Process) -> None:
    assert misbehaving.error("test.unspeakable")["type"] == "TypeError"
    assert misbehaving.error("test.result", size_bytes=65 << 20)["type"] == "ProtocolError"
    assert misbehaving.result("test.result", size_bytes=3) == "xxx"


def test_gives_everything_back_when_stdin_ends(misbehaving: Process) -> None:
    misbehaving.result("test.hold", name="one", fails=True)
    misbehaving.result("test.hold", name="two")
    status, out, err = misbehaving.end()
    assert (status, out) == (0, b"")
    assert err.splitlines() == ["gave back one", "gave back two", "agent: OSError: [Errno 5] stuck"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_gives_everything_back_when_killed_mid_call(
    misbehaving: Process, number: signal.Signals
) -> None:
    misbehaving.result("test.hold", name="one")
    misbehaving.stdin.write(b'{"id": 1, "method": "test.sleep", "params": {"seconds": 30}}\n')
    misbehaving.stdin.flush()
    assert misbehaving.process.stderr is not None
    misbehaving.process.send_signal(number)
    status, out, err = misbehaving.end()
    assert (status, out, err) == (128 + number, b"", "gave back one\n")


def test_gives_everything_back_when_nobody_reads(misbehaving: Process) -> None:
    misbehaving.result("test.hold", name="one")
    misbehaving.stdout.close()
    misbehaving.stdin.write(b'{"id": 1, "method": "test.result", "params": {"size_bytes": 1}}\n')
    misbehaving.stdin.flush()
    assert misbehaving.process.wait(timeout=10) == 0
    assert misbehaving.process.stderr is not None
    assert misbehaving.process.stderr.read() == b"gave back one\n"


def test_starts_without_what_is_slow_to_import(misbehaving: Process) -> None:
    misbehaving.result("iommu.groups")
    loaded = set(misbehaving.result("test.modules"))
    slow = {"ctypes", "dataclasses", "hashlib", "inspect", "mmap", "pathlib", "traceback", "typing"}
    assert loaded & slow == set()
