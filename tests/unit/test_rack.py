# SPDX-License-Identifier: Apache-2.0
"""A rack's end, whatever its nodes are doing."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testbed.errors import HostError, LostError
from testbed.machine.command import AGENT_SOCKET
from testbed.rack import Rack, on_all

LONG_S = 60.0
DEADLINE_S = 10.0


class Keeper:
    """One node, whose machine never answers; ``ends``: its end can be had."""

    name, nodes = "rack", ("host0",)

    def __init__(self, folder: Path, *, ends: bool = True) -> None:
        self.folder = self.run_folder = folder
        self.is_closed = False
        self._ends = ends
        (folder / "host0").mkdir()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "host0" / AGENT_SOCKET))
        self.listener.listen()
        self._wires: list[socket.socket] = []

    def accept(self) -> None:
        """Return when somebody waits for the agent."""
        self._wires.append(self.listener.accept()[0])

    def exit_of(self, _: str) -> None:
        if self.listener.fileno() < 0:
            raise LostError("it is gone", node="host0")

    def shutdown(self) -> None:
        if not self._ends:
            raise HostError("it survived")
        self.close()

    def close(self) -> None:
        self.is_closed = True
        for each in (*self._wires, self.listener):
            each.close()


def rack_of(keeper: Any) -> Rack:
    plan: Any = SimpleNamespace(
        nodes={"host0": SimpleNamespace(name="host0")},
        topology=SimpleNamespace(nodes={"host0": None}),
    )
    keys: Any = None
    return Rack(keeper, plan, keys, {}, owner=True)


def test_it_does_not_wait_for_who_waits_for_an_answer(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    rack = rack_of(keeper)
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            on_all(rack, lambda node: node.introduce((b"first",), LONG_S))
        except LostError as error:
            ended.append(error)

    waits = threading.Thread(target=wait, daemon=True)
    waits.start()
    keeper.accept()
    stops = threading.Thread(target=rack.close, daemon=True)
    stops.start()
    stops.join(DEADLINE_S)
    assert not stops.is_alive()
    waits.join(DEADLINE_S)
    assert [str(error) for error in ended] == ["it is gone"]


def test_of_a_keeper_that_does_not_end_it_lets_go_too(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, ends=False)
    with pytest.raises(HostError, match="survived"):
        rack_of(keeper).close()
    assert keeper.is_closed
