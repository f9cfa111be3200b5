# SPDX-License-Identifier: Apache-2.0
"""A stream of messages, received as it comes: several at once, in parts, with descriptors."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from testbed.models import channel, wire
from testbed.models.channel import Channel
from testbed.models.memory import MemoryCache
from testbed.models.progress import Progress
from testbed.models.server import Session
from testbed.models.supervisor import PulledOut
from testbed.models.wire import Command, HeaderFlag
from tests.contract.vfio_user_client import open_descriptors

READ = wire.REGION_ACCESS.encode(wire.RegionAccess(0, 0, 4))


class Ears:
    """What came: each message's number, payload and the file behind each of its descriptors."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, bytes, list[int]]] = []
        self.ended = ""
        self.on_message: Callable[[], None] = lambda: None

    def message(self, header: wire.Header, payload: memoryview, fds: list[int]) -> None:
        files = [os.fstat(fd).st_ino for fd in fds]
        self.heard.append((header.message_id, bytes(payload), files))
        self.on_message()

    def closed(self, reason: str) -> None:
        self.ended = reason


def message(number: int, payload: bytes = b"") -> bytes:
    return wire.encode_header(number, Command.DEVICE_RESET, len(payload)) + payload


def hear(
    send: Callable[[socket.socket], None], count: int, progress: Progress | None = None
) -> Ears:
    """All that is sent is there before the first of it is received."""

    async def run() -> Ears:
        ours, theirs = socket.socketpair()
        ears = Ears()
        with ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            send(ours)
            made = Channel(theirs, ears, progress)
            async with asyncio.timeout(5):
                while len(ears.heard) < count and not ears.ended:
                    await asyncio.sleep(0)
            made.close()
        return ears

    return asyncio.run(run())


@pytest.fixture
def files() -> Iterator[list[int]]:
    made = [os.memfd_create(f"file{n}") for n in range(4)]
    yield made
    for fd in made:
        os.close(fd)


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


class TestDescriptors:
    """unix(7) keeps them with the bytes that they came with; several messages are one read."""

    def test_each_message_has_its_own(self, files: list[int]) -> None:
        given: list[list[int]] = [[], [files[0]], [], [], [files[1], files[2]], [files[3]], []]

        def send(ours: socket.socket) -> None:
            for number, fds in enumerate(given):
                if fds:
                    socket.send_fds(ours, [message(number, b"x" * number)], fds)
                else:
                    ours.send(message(number, b"x" * number))

        before = open_descriptors()
        ears = hear(send, len(given))
        assert ears.heard == [
            (number, b"x" * number, [inode(fd) for fd in fds]) for number, fds in enumerate(given)
        ]
        assert open_descriptors() == before

    @pytest.mark.parametrize("first", [1, 7, 16, 20])
    def test_a_message_in_parts(self, files: list[int], first: int) -> None:
        """The rest of one comes with another behind it, which has a descriptor too."""
        one, other = message(1, b"0123456789"), message(2, b"abc")

        async def run() -> Ears:
            ours, theirs = socket.socketpair()
            ears = Ears()
            with ours:
                ours.send(message(0, bytes(1000)))
                socket.send_fds(ours, [one[:first]], [files[0]])
                made = Channel(theirs, ears)
                for _ in range(5):
                    await asyncio.sleep(0)
                assert len(ears.heard) == 1
                ours.send(one[first:])
                socket.send_fds(ours, [other], [files[1]])
                ours.send(message(3))
                async with asyncio.timeout(5):
                    while len(ears.heard) < 4:
                        await asyncio.sleep(0)
                made.close()
            return ears

        assert asyncio.run(run()).heard[1:] == [
            (1, b"0123456789", [inode(files[0])]),
            (2, b"abc", [inode(files[1])]),
            (3, b"", []),
        ]

    @pytest.mark.parametrize("shared", [False, True])
    def test_a_long_message_between_others(self, files: list[int], shared: bool) -> None:
        long = bytes(range(256)) * 100

        def send(ours: socket.socket) -> None:
            ours.send(message(1))
            socket.send_fds(ours, [message(2, long)], [files[0]])
            socket.send_fds(ours, [message(3, b"abc")], [files[1]])

        ears = hear(send, 3, Progress() if shared else None)
        assert ears.heard == [
            (1, b"", []),
            (2, long, [inode(files[0])]),
            (3, b"abc", [inode(files[1])]),
        ]

    def test_too_many_over_the_parts_of_a_message(self, files: list[int]) -> None:
        def send(ours: socket.socket) -> None:
            for part in (message(1, b"abc")[at : at + 5] for at in range(0, 15, 5)):
                socket.send_fds(ours, [part], files * 2)

        before = open_descriptors()
        assert hear(send, 1).ended == "protocol error: too many descriptors"
        assert open_descriptors() == before


class TestTurns:
    @pytest.mark.parametrize("size", [0, 8, 24])
    def test_more_than_a_turn_in_one_read(self, size: int) -> None:
        """Nothing else comes for what is left: it is handled all the same, and in order."""
        count = 5 * channel.MESSAGES_A_TURN

        def send(ours: socket.socket) -> None:
            ours.send(b"".join(message(n, b"y" * size) for n in range(count)))

        assert [number for number, _, _ in hear(send, count).heard] == list(range(count))

    def test_others_have_their_turn(self) -> None:
        ears, seen = Ears(), []

        async def run() -> None:
            ours, theirs = socket.socketpair()
            with ours:
                count = 10 * channel.MESSAGES_A_TURN  # two inboxes and more
                ours.send(b"".join(message(n) for n in range(count)))
                made = Channel(theirs, ears)
                while len(ears.heard) < count:
                    await asyncio.sleep(0)
                    seen.append(len(ears.heard))
                made.close()

        asyncio.run(run())
        most = max(b - a for a, b in zip([0, *seen], seen, strict=False))
        assert most <= 2 * channel.MESSAGES_A_TURN

    def test_closed_within_a_read(self) -> None:
        """What came with the message that ended the channel is not handled."""

        async def run() -> Ears:
            ours, theirs = socket.socketpair()
            ears = Ears()
            with ours:
                ours.send(message(1) + message(2))
                made = Channel(theirs, ears)
                ears.on_message = made.close
                for _ in range(5):
                    await asyncio.sleep(0)
            return ears

        assert [number for number, _, _ in asyncio.run(run()).heard] == [1]

    def test_the_end_within_a_message(self) -> None:
        def send(ours: socket.socket) -> None:
            ours.send(message(1) + message(2, b"abc")[:17])
            ours.shutdown(socket.SHUT_WR)

        ears = hear(send, 2)
        assert [number for number, _, _ in ears.heard] == [1]
        assert ears.ended == "the other side is gone (within a message)"


class TestDeath:
    """A process dies with requests in its inbox: the one that it was in fails, the others do not"""

    @pytest.mark.parametrize("received", [16, 20, 32])
    def test_the_requests_behind_are_answered(self, received: int) -> None:
        """The first was whole and under way; the third is received in part."""
        reads = [wire.encode_header(n, Command.REGION_READ, 16) + READ for n in (5, 6, 7)]
        progress = Progress()
        whole = b"".join(reads)
        end = 64 + received
        progress.inbox[:end] = whole[:end]
        progress.note(0, end)

        async def run() -> bytes:
            ours, theirs = socket.socketpair()
            with ours:
                ours.settimeout(5)
                rest = progress.settle(theirs)
                assert rest == whole[32:end]
                session = Session(
                    theirs, PulledOut("gone"), MemoryCache(), lambda *_: None,
                    removed=True, received=rest,
                )  # fmt: skip
                ours.send(whole[end:])
                for _ in range(10):
                    await asyncio.sleep(0)
                session.close("enough")
                return ours.recv(4096)

        answer = asyncio.run(run())
        first = wire.header_at(memoryview(answer), 0)
        assert (first.message_id, first.size, first.error) == (5, 16, errno.EIO)
        assert first.flags & HeaderFlag.ERROR
        second, third = answer[16:52], answer[52:]
        assert [wire.header_at(memoryview(a), 0).message_id for a in (second, third)] == [6, 7]
        assert second[-4:] == third[-4:] == b"\xff" * 4

    def test_what_was_answered_is_not_under_way(self) -> None:
        progress = Progress()

        def send(ours: socket.socket) -> None:
            ours.send(message(1) + message(2))

        assert len(hear(send, 2, progress).heard) == 2
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert progress.settle(theirs) == b""
            ours.setblocking(False)
            with pytest.raises(BlockingIOError):
                ours.recv(1)

    def test_of_a_long_message_the_rest_is_received(self) -> None:
        long = message(9, bytes(20000))
        progress = Progress()
        seen: list[int] = []

        async def run() -> None:
            ours, theirs = socket.socketpair()
            with ours, theirs.dup() as held:
                ours.send(long[:9000])
                made = Channel(theirs, Ears(), progress)
                for _ in range(5):
                    await asyncio.sleep(0)
                ours.send(long[9000:] + message(10))
                ours.settimeout(5)
                assert progress.settle(held) == b""
                answer = ours.recv(4096)
                seen.append(wire.header_at(memoryview(answer), 0).message_id)
                assert held.recv(4096) == message(10)
                made.close()

        asyncio.run(run())
        assert seen == [9]
