# SPDX-License-Identifier: Apache-2.0
"""The server of bells, spoken to as QEMU's ``ivshmem-doorbell`` does (hw/misc/ivshmem-pci.c)."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.machine.bell_server import THE_MEMORY, VERSION, BellServer

MEMORY_BYTES = 1 << 20
VECTORS = 2


class Machine:
    """One end of a bell's socket: messages in, eventfds by number."""

    def __init__(self, path: Path) -> None:
        self.wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.wire.settimeout(5)
        self.wire.connect(str(path))
        self.bells: dict[int, list[int]] = {}

    def read(self) -> tuple[int, int | None]:
        """A message's number and descriptor."""
        data, fds, _, _ = socket.recv_fds(self.wire, 8, 1)
        assert len(data) == 8, "the server has hung up"
        return struct.unpack("<q", data)[0], fds[0] if fds else None

    def take(self, count: int) -> list[int]:
        """Read that many messages about clients; answers their numbers."""
        numbers = []
        for _ in range(count):
            number, fd = self.read()
            numbers.append(number)
            if fd is None:
                for each in self.bells.pop(number):
                    os.close(each)
            else:
                self.bells.setdefault(number, []).append(fd)
        return numbers

    def introduced(self) -> tuple[int, int]:
        """What every client is told first: its number, and the memory's descriptor."""
        assert self.read() == (VERSION, None)
        number, nothing = self.read()
        assert nothing is None
        mark, memory = self.read()
        assert mark == THE_MEMORY
        assert memory is not None
        return number, memory

    def is_quiet(self) -> bool:
        """Nothing more is to be read."""
        self.wire.setblocking(False)
        try:
            self.wire.recv(1)
        except BlockingIOError:
            return True
        finally:
            self.wire.settimeout(5)
        return False

    def close(self) -> None:
        self.wire.close()
        for fds in self.bells.values():
            for fd in fds:
                os.close(fd)
        self.bells.clear()


class Rack:
    """The server, and who is connected."""

    def __init__(self, folder: Path, count: int) -> None:
        self.paths = [folder / f"{number}.bell" for number in range(count)]
        self.server = BellServer([str(path) for path in self.paths], VECTORS, MEMORY_BYTES)
        self.machines: list[Machine] = []

    def come(self, number: int) -> Machine:
        machine = Machine(self.paths[number])
        self.machines.append(machine)
        self.server.serve_once(5)
        assert machine.introduced()[0] == number
        return machine

    def close(self) -> None:
        for machine in self.machines:
            machine.close()
        self.server.close()


@pytest.fixture
def rack(tmp_path: Path) -> Iterator[Rack]:
    made = Rack(tmp_path, 3)
    yield made
    made.close()


def rings(fd: int) -> int:
    """How often an eventfd was rung."""
    os.set_blocking(fd, False)
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def open_files() -> int:
    """How many descriptors this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


ALL = 3 * VECTORS


def test_numbers_are_those_of_the_sockets_whoever_comes_first(rack: Rack) -> None:
    late, early = rack.come(2), rack.come(0)
    assert late.take(ALL) == [0, 0, 1, 1, 2, 2]  # the others, also who is not there; then itself
    assert early.take(ALL) == [1, 1, 2, 2, 0, 0]
    assert late.is_quiet()
    assert early.is_quiet()


def test_each_vector_of_each_client_is_a_bell_of_its_own(rack: Rack) -> None:
    one, two = rack.come(0), rack.come(1)
    one.take(ALL)
    two.take(ALL)
    os.eventfd_write(one.bells[1][1], 1)  # one rings two's second vector
    assert [rings(fd) for fd in two.bells[1]] == [0, 1]
    assert [rings(fd) for fd in one.bells[0]] == [0, 0]
    os.eventfd_write(two.bells[0][0], 3)
    assert [rings(fd) for fd in one.bells[0]] == [3, 0]


def test_all_have_the_same_memory(rack: Rack) -> None:
    first = Machine(rack.paths[0])
    second = Machine(rack.paths[1])
    rack.machines += [first, second]
    rack.server.serve_once(5)
    rack.server.serve_once(0)
    (_, mine), (_, theirs) = first.introduced(), second.introduced()
    assert os.fstat(mine).st_size == MEMORY_BYTES
    os.pwrite(mine, b"seen", 4096)
    assert os.pread(theirs, 4, 4096) == b"seen"
    os.close(mine)
    os.close(theirs)


def test_who_comes_back_is_rung_as_before_and_not_by_what_it_missed(rack: Rack) -> None:
    stays, goes = rack.come(0), rack.come(1)
    stays.take(ALL)
    goes.close()
    rack.server.serve_once(5)
    assert 1 not in rack.server.clients
    assert stays.is_quiet()  # QEMU does not survive being told of a number twice
    os.eventfd_write(stays.bells[1][0], 5)
    back = rack.come(1)
    back.take(ALL)
    assert rings(back.bells[1][0]) == 0
    os.eventfd_write(stays.bells[1][0], 1)
    assert rings(back.bells[1][0]) == 1
    assert stays.is_quiet()


def test_a_machine_started_anew_before_its_end_was_seen_takes_its_place(rack: Rack) -> None:
    old = rack.come(1)
    new = rack.come(1)
    old.take(ALL)
    assert old.wire.recv(8) == b""  # the server has let go of the old one
    new.take(ALL)
    assert new.is_quiet()


def test_who_comes_and_goes_leaves_nothing_open(rack: Rack) -> None:
    before = open_files()
    for _ in range(20):
        machine = Machine(rack.paths[1])
        rack.server.serve_once(5)
        machine.close()
        rack.server.serve_once(5)
    assert not rack.server.clients
    assert open_files() == before


def test_what_a_client_says_is_read_by_nobody(rack: Rack) -> None:
    one = rack.come(0)
    one.wire.sendall(b"\xff" * 64)
    rack.server.serve_once(5)
    assert 0 in rack.server.clients
