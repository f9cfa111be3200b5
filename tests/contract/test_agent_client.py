# SPDX-License-Identifier: Apache-2.0
"""The agent's client against a fake agent on a socket pair: every way in which it can break."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import AgentError, GuestPanic, LinkLost
from testbed.guest.agent import AgentClient
from testbed.guest.ship import connect

HELLO = b'{"hello": {"protocol": 1, "agent": "test", "kernel": "7.2", "pid": 1}}\n'
Reply = Callable[[dict[str, Any]], bytes | None]


class FakeAgent:
    """Says hello, then answers each request line with what ``reply`` makes of it."""

    def __init__(self, reply: Reply, hello: bytes = HELLO) -> None:
        self.near, self._far = socket.socketpair()
        self._reply, self._hello = reply, hello
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._far, self._far.makefile("rb") as lines:
            self._far.sendall(self._hello)
            for line in lines:
                answer = self._reply(json.loads(line))
                if answer is None:
                    return
                if answer:
                    self._far.sendall(answer)

    def close(self) -> None:
        self.near.close()
        self._thread.join(5)


@pytest.fixture
def agent() -> Iterator[Callable[..., AgentClient]]:
    made: list[FakeAgent] = []

    def make(reply: Reply, hello: bytes = HELLO, **options: Any) -> AgentClient:
        fake = FakeAgent(reply, hello)
        made.append(fake)
        return AgentClient("host0", fake.near, hello_timeout_s=1.0, **options)

    yield make
    for fake in made:
        fake.close()


def line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


Make = Callable[..., AgentClient]


def test_a_call_returns_the_result_and_is_recorded(agent: Make) -> None:
    seen: list[Any] = []
    client = agent(lambda r: line({"id": r["id"], "result": r["params"]}), record=seen.append)
    assert client.call("echo", x=1) == {"x": 1}
    assert client.hello["kernel"] == "7.2"
    assert (seen[0]["method"], seen[0]["result"]) == ("echo", {"x": 1})


def test_an_error_keeps_type_errno_and_place_and_the_link_goes_on(agent: Make) -> None:
    def reply(request: dict[str, Any]) -> bytes:
        if request["method"] == "bad":
            error = {"type": "OSError", "message": "no", "errno": 22, "where": "vfio.py:1 map"}
            return line({"id": request["id"], "error": error})
        return line({"id": request["id"], "result": "fine"})

    client = agent(reply)
    with pytest.raises(AgentError) as caught:
        client.call("bad")
    assert (caught.value.remote_type, caught.value.errno) == ("OSError", 22)
    assert client.call("good") == "fine"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda r: b"\x00\xff garbage\n", "garbage"),
        (lambda r: b"[1, 2]\n", "garbage"),
        (lambda r: line({"id": 77, "result": 0}), "to call 1"),
        (lambda r: b'{"id": 1, "res', "did not come in time"),
        (lambda r: b"", "did not come in time"),
        (lambda r: None, "channel closed"),
    ],
)
def test_a_broken_agent_is_lost_and_stays_lost(agent: Make, reply: Reply, words: str) -> None:
    client = agent(reply)
    with pytest.raises(LinkLost, match=words):
        client.call("x", 0.3)
    with pytest.raises(LinkLost, match=words):
        client.call("x")


@pytest.mark.parametrize(
    ("hello", "words"),
    [
        (b"sh: python3: not found\n", "garbage"),
        (b'{"hello": {"protocol": 9}}\n', "protocol 9"),
        (b'{"id": 1}\n', "instead of its hello"),
        (b"", "hello did not come"),
    ],
)
def test_a_wrong_hello_is_lost(agent: Make, hello: bytes, words: str) -> None:
    with pytest.raises(LinkLost, match=words):
        agent(lambda r: b"", hello)


def test_the_owner_explains_a_broken_link(agent: Make) -> None:
    def blame(error: LinkLost) -> GuestPanic:
        return GuestPanic("it panicked", node=error.node, console_tail="Kernel panic")

    client = agent(lambda r: None, blame=blame)
    with pytest.raises(GuestPanic, match="Kernel panic"):
        client.call("x")


@pytest.mark.parametrize("said", [b"", b'{"unfit": "another device"}\n'])
def test_a_way_to_an_agent_that_does_not_answer_is_closed(tmp_path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()

        def messages() -> Iterator[bytes]:
            yield b"first"
            wires.append(listener.accept()[0])
            wires[0].sendall(said)
            if not said:
                raise BrokenPipeError("nobody reads it")

        wires: list[socket.socket] = []
        with pytest.raises(LinkLost, match=r"nobody reads it|another device") as caught:
            connect("host0", tmp_path / "agent.sock", blame=lambda error: error, first=messages())
        with wires[0] as wire:
            wire.settimeout(5)
            assert wire.recv(10) == b"first"
            assert wire.recv(10) == b"", f"although somebody has {caught.value!r}"
