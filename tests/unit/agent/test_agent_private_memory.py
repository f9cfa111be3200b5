# SPDX-License-Identifier: Apache-2.0
"""Memory of the agent's own that devices may mirror: where its pages are, and wrong words."""

from __future__ import annotations

import mmap
import os

import pytest

from guest_agent import hmm_methods
from guest_agent.agent import Agent
from guest_agent.p2p import command_file
from guest_agent.p2p.private_memory import MAX_PAGES, PrivateMemory
from guest_agent.rpc import ParameterError


def test_only_what_was_touched_is_in_system_memory() -> None:
    memory = PrivateMemory()
    memory.alloc("a", 3)
    assert memory.pages("a") == [-1, -1, -1]
    memory.memory("a").write(mmap.PAGESIZE, b"x")
    before, touched, after = memory.pages("a")
    # Who is not root is told that it is there, not where.
    assert (before, after) == (-1, -1)
    assert touched >= 0
    memory.close()


@pytest.mark.parametrize("pages", [0, MAX_PAGES + 1])
def test_too_little_and_too_much(pages: int) -> None:
    with pytest.raises(ParameterError, match="pages: 1 to 16"):
        PrivateMemory().alloc("a", pages)


def test_names() -> None:
    memory = PrivateMemory()
    memory.alloc("a", 1)
    with pytest.raises(ParameterError, match="there is a memory 'a'"):
        memory.alloc("a", 1)
    with pytest.raises(ParameterError, match="there is no 'b'"):
        memory.pages("b")
    with pytest.raises(ParameterError, match="mirror: there is no 'b'"):
        memory.tell("b", "state")
    memory.close()
    memory.alloc("a", 1)  # the name is free again
    memory.close()


def test_a_device_writes_at_most_what_it_has_a_buffer_for() -> None:
    for size in (0, command_file.BOUNCE_BYTES + 1):
        with pytest.raises(ParameterError, match="1 to 4096 bytes"):
            hmm_methods._dma_write(Agent(), mirror="a", page=0, hex="00" * size)


def test_an_answer_is_lines_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(os, "pwrite", lambda _fd, data, _at: written.append(data))
    answer = b"errno=0 moved=2\npage=0 offset=0x1000 kind=peer\n"
    monkeypatch.setattr(os, "pread", lambda *_: answer)
    assert command_file.tell(3, "take a") == [
        {"errno": 0, "moved": 2},
        {"page": 0, "offset": 4096, "kind": "peer"},
    ]
    assert written == [b"take a"]


def test_a_command_that_makes_no_sense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="take a: Invalid argument"):
        command_file.tell(3, "take a")
