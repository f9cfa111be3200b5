# SPDX-License-Identifier: Apache-2.0
"""What the agent does around devices that go away: streams, bounded calls, memory that is gone."""

from __future__ import annotations

import errno
import mmap
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guest_agent.hw import loss, storage
from guest_agent.hw.region import Region
from guest_agent.rpc import ParameterError


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region(mmap.mmap(-1, mmap.PAGESIZE))
    yield made
    made.close()


def transfers(monkeypatch: pytest.MonkeyPatch, act: Callable[[], dict[str, Any]]) -> None:
    monkeypatch.setattr(storage, "transfer", lambda *_: act())


def test_a_stream_ends_with_the_first_error(
    monkeypatch: pytest.MonkeyPatch, region: Region
) -> None:
    left = ["EIO", "", ""]
    transfers(monkeypatch, lambda: {"bytes": 0, "error": left.pop()})
    answer = loss.Stream("disk", region, 4096).end(5)
    assert answer == {"transfers": 2, "error": "EIO", "by_itself": True, "ended": True}


@pytest.mark.parametrize(
    ("error", "word"),
    [(OSError(errno.ENXIO, "gone"), "ENXIO"), (ParameterError("no such disk"), "ENODEV")],
)
def test_a_disk_that_is_gone_has_an_errno(
    monkeypatch: pytest.MonkeyPatch, region: Region, error: Exception, word: str
) -> None:
    def act() -> dict[str, Any]:
        raise error

    transfers(monkeypatch, act)
    assert loss.Stream("disk", region, 4096).end(5)["error"] == word


def test_a_stream_that_goes_on_is_stopped(monkeypatch: pytest.MonkeyPatch, region: Region) -> None:
    transfers(monkeypatch, lambda: {"bytes": 4096, "error": ""})
    made = loss.Loss()
    made.start("disk", region, 4096)
    with pytest.raises(ParameterError, match="runs already"):
        made.start("disk", region, 4096)
    answer = made.end(0.05)
    assert (answer["by_itself"], answer["ended"], answer["error"]) == (False, True, "")
    with pytest.raises(ParameterError, match="no stream"):
        made.progress()
    made.close()


def test_what_does_not_come_back_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "Binding", lambda *_: time.sleep(1))
    answer = loss.Loss().unbind("0000:01:00.0", 0.05)
    assert answer["ended"] is False
    assert answer["seconds"] < 1


def test_only_what_was_unbound_is_bound_again() -> None:
    with pytest.raises(ParameterError, match="was not unbound"):
        loss.Loss().rebind("0000:01:00.0", 1)


def test_memory_that_is_gone_ends_who_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_bytes(bytes(mmap.PAGESIZE))
    with file.open("r+b") as opened:
        region = Region(mmap.mmap(opened.fileno(), mmap.PAGESIZE))
        assert loss.touch(region, 10) == {"signal": 0}
        opened.truncate(0)
        assert loss.touch(region, 10) == {"signal": signal.SIGBUS}
    region.close()
