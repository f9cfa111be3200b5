# SPDX-License-Identifier: Apache-2.0
"""A model process, its machine's side of the sockets, and its control, for tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from testbed.errors import InputError
from testbed.models import wire
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
        self._number = 0
        self.call(Command.VERSION, wire.encode_version(0, 0, wire.OURS))

    def call(self, command: int, payload: bytes) -> bytes:
        self._number += 1
        self.socket.sendall(wire.encode_header(self._number, command, len(payload)) + payload)
        header = wire.HEADER.decode(self.receive(16))
        # A model that died just after an answer has another given in its place; QEMU drops that.
        while header.message_id != self._number:
            self.receive(header.size - 16)
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


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().split()
    return int(fields[13]) + int(fields[14])
