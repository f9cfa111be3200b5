# SPDX-License-Identifier: Apache-2.0
"""The console log's follower: what it finds, and what it survives."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.machine import console
from testbed.machine.console import Console, plain_text, read_tail

PANIC = (
    "[    1.234567] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block\r\n"
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


def add(log: Path, data: bytes | str) -> None:
    with log.open("ab") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def test_a_missing_file_is_an_empty_one(log: Path) -> None:
    follower = Console(log)
    follower.poll()
    assert (follower.panic, follower.oops, follower.ready, follower.tail()) == ("", "", False, "")
    add(log, "testbed: ready\n")
    follower.poll()
    assert follower.ready


def test_a_trace_begins_where_the_kernel_went_wrong(log: Path) -> None:
    follower = Console(log)
    add(log, "before\n" * 5)
    follower.poll()
    assert follower.trace() == follower.tail()
    add(log, "[1.0] BUG: kernel NULL pointer dereference\nRIP: begin+0x4/0xff0 [mine]\n")
    add(log, "more\n" * 60 + "[1.1] Oops: 0002\n" + PANIC)
    follower.poll()
    lines = follower.trace().splitlines()
    assert lines[:2] == [
        "[1.0] BUG: kernel NULL pointer dereference",
        "RIP: begin+0x4/0xff0 [mine]",
    ]
    assert len(lines) == 64
    assert "not syncing" in lines[-1]
    add(log, "more\n" * 100)
    follower.poll()
    assert len(follower.trace().splitlines()) == console.TRACE_LINES


def test_what_the_guest_misses(log: Path) -> None:
    follower = Console(log)
    add(log, "[ 1.0] testbed: no\ntestbed: there are no modules\r\ntestbed: no card\n")
    follower.poll()
    assert (follower.complaint, follower.ready) == ("no card", False)
    add(log, "testbed: ready\n")
    follower.poll()
    assert (follower.complaint, follower.ready) == ("no card", True)


def test_a_panic_gives_its_reason(log: Path) -> None:
    follower = Console(log)
    add(
        log, "one\n" + PANIC + "[    1.3] CPU: 0\n---[ end Kernel panic - not syncing: other ]---\n"
    )
    follower.poll()
    assert follower.panic == "VFS: Unable to mount root fs on unknown-block"
    assert follower.tail(2).splitlines()[0] == "[    1.3] CPU: 0"


@pytest.mark.parametrize(
    ("line", "oops"),
    [
        ("[1.0] BUG: kernel NULL pointer dereference, address: 0", "BUG: kernel NULL pointer"),
        ("[1.0] Oops: general protection fault, probably for", "Oops: general protection"),
        ("[1.0] kernel BUG at mm/slub.c:321!", "kernel BUG at mm/slub.c:321!"),
        ("[1.0] DEBUG: nothing", ""),
        ("[1.0] Oopsla 2026", ""),
        ("testbed: debugging", ""),
    ],
)
def test_oopses(log: Path, line: str, oops: str) -> None:
    follower = Console(log)
    add(log, line + "\n")
    follower.poll()
    assert follower.oops.startswith(oops)
    assert bool(follower.oops) == bool(oops)
    assert not follower.panic


def test_words_cut_anywhere_are_found(log: Path) -> None:
    data = PANIC.encode() + b"testbed: ready\n"
    follower = Console(log)
    for number in range(len(data)):
        add(log, data[number : number + 1])
        follower.poll()
    assert follower.panic == "VFS: Unable to mount root fs on unknown-block"
    assert follower.ready
    assert follower.tail().count("\n") == 1


def test_last_words_without_a_newline(log: Path) -> None:
    follower = Console(log)
    add(log, "Kernel panic - not syncing: Fatal")
    follower.poll()
    assert follower.panic == "Fatal"
    assert follower.tail() == "Kernel panic - not syncing: Fatal"


def test_binary_garbage_is_dropped(log: Path) -> None:
    follower = Console(log)
    add(log, b"\x00\xff\xfe\x80\x1b[2J\x1b[1;31mred\x1b[0m \xc3\xa9\x07\r\n" + bytes(range(256)))
    add(log, b"\ntestbed: ready\n")
    follower.poll()
    assert follower.ready
    assert follower.tail(50).splitlines()[0] == "red é"
    assert all(c.isprintable() or c in "\t\n" for c in follower.tail(50))


def test_memory_is_bounded(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "CHUNK_BYTES", 4096)
    follower = Console(log)
    add(log, b"x" * 1_000_000 + b"\n" + b"line\n" * 10_000)
    follower.poll()
    assert len(follower.tail(10**9)) < console.MAX_LINES * console.MAX_LINE_CHARACTERS
    assert follower.tail(10**9).count("\n") < console.MAX_LINES
    add(log, "testbed: ready\n")
    follower.poll()
    assert follower.ready


def test_a_truncated_log_is_read_anew(log: Path) -> None:
    follower = Console(log)
    add(log, "a long first life\n")
    follower.poll()
    log.write_text("second\n")
    follower.poll()
    assert follower.tail(1) == "second"


def test_tails(log: Path) -> None:
    assert read_tail(log) == ""
    add(log, b"one\ntwo\n\x1b[1mthree\x1b[0m\xff")
    assert read_tail(log) == "one\ntwo\nthree"
    assert read_tail(log, max_bytes=14) == "three"
    assert plain_text(b"a\tb\r") == "a\tb"
