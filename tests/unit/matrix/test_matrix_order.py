# SPDX-License-Identifier: Apache-2.0
"""In which order the parts of a run begin, and what a rack of several machines needs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from testbed.matrix import child
from testbed.matrix.apart import Apart, Part
from testbed.matrix.needs import Need, Room, need_of
from testbed.topology import load

ROOT = Path(__file__).parents[3]


def test_the_longest_begin_first_and_are_told_in_the_order_of_the_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def run(words: list[str], folder: Path, **_: Any) -> None:
        begun.append(folder.name)
        raise OSError("nothing runs here")

    monkeypatch.setattr(child, "run", run)
    parts = [
        Part("short", (), Need(0, 1)),
        Part("wide", (), Need(0, 4)),
        Part("long", (), Need(0, 1), weight=9),
        Part("middle", (), Need(0, 1), weight=3),
    ]
    stream = io.StringIO()
    run_all = Apart(parts, tmp_path, Room(1, 2, 0), ["testbed"])
    run_all.run(stream, Console(file=io.StringIO()))
    assert begun == ["wide", "long", "middle", "short"]
    told = [word for word in stream.getvalue().split() if word in begun]
    assert list(dict.fromkeys(told)) == [part.label for part in parts]


def test_machines_of_one_rack_take_turns_with_a_processor_and_none_with_memory() -> None:
    one, four = (
        need_of(load.load(ROOT / "topologies" / f"{name}.yaml", {}))
        for name in ("minimal", "four-node-ring")
    )
    assert (one.cores, four.cores) == (1, 1)
    assert four.memory_bytes > 3 * one.memory_bytes
