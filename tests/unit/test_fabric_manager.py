# SPDX-License-Identifier: Apache-2.0
"""The host's fabric manager and a node's return, against machines that are not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from testbed import deploy, fabric
from testbed.errors import (
    CapabilityMissing,
    HostError,
    InputError,
    LaunchError,
    NoSuchRack,
    QmpError,
)
from testbed.machine.client import Exit
from testbed.machine.command import NodeCommand
from testbed.rack import Rack
from testbed.rack_node import RackNode
from testbed.topology.model import from_data
from testbed.topology.placement import place
from testbed.topology.plan import RackPlan

SIZE = 32 << 20


def plan_of(count: int = 2) -> RackPlan:
    below = [{"gpu": "gpu0", "vram": SIZE, "engine": "model"}]
    ports = [{"root_port": "rp0", "below": below}, {"root_port": "spare"}]
    nodes = {name: {"pcie": ports} for name in ("one", "two")[:count]}
    return place(from_data({"rack": "r", "nodes": nodes}))


class Machine:
    """A node whose QEMU refuses what ``refuses`` names, that often (-1: always)."""

    def __init__(self, plan: RackPlan, name: str) -> None:
        self.name = name
        self.plan = plan.nodes[name]
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.refuses: dict[str, int] = {}

    def qmp(self, command: str, **arguments: Any) -> None:
        self.said.append((command, arguments))
        left = self.refuses.get(command, 0)
        if left:
            self.refuses[command] = left - 1
            raise QmpError(f"{command}: no", error_class="GenericError", description="in use")


class Racked:
    """As much of a rack as the fabric manager wants."""

    def __init__(self) -> None:
        plan = plan_of()
        self.machines = {name: Machine(plan, name) for name in plan.nodes}
        self.keeper = self
        self.pid = 77

    def node(self, name: str) -> Machine:
        return self.machines[name]

    def call(self, method: str, name: str) -> dict[str, int]:
        assert method == "memory"
        if name != "two/gpu0.vram":
            raise HostError(f"no such memory: {name}")
        return {"fd": 11, "size_bytes": SIZE}


@pytest.fixture
def racked() -> Racked:
    return Racked()


def plug(racked: Racked, port: str = "spare", memory: str = "two/gpu0.vram") -> fabric.Window:
    return fabric.plug(cast(Rack, racked), "one", port, memory)


def test_a_window_is_the_keeper_s_memory_in_an_empty_port(racked: Racked) -> None:
    window = plug(racked)
    (backend, device) = racked.node("one").said
    assert backend[0] == "object-add"
    assert backend[1]["mem-path"] == "/proc/77/fd/11"
    assert (backend[1]["size"], backend[1]["share"]) == (SIZE, True)
    assert device[1]["bus"] == "spare"
    assert device[1]["memdev"] == backend[1]["id"] == window.backend
    assert not racked.node("two").said


@pytest.mark.parametrize("port", ["rp0", "nowhere", "gpu0"])
def test_a_port_that_is_taken_or_none_is_bad_input(racked: Racked, port: str) -> None:
    with pytest.raises(InputError, match=f"node 'one' has no empty root port '{port}'"):
        plug(racked, port)
    assert not racked.node("one").said


def test_memory_that_is_not_there_is_named_and_nothing_is_plugged(racked: Racked) -> None:
    with pytest.raises(HostError, match="two/gpu9"):
        plug(racked, memory="two/gpu9.vram")
    assert not racked.node("one").said


def test_a_device_that_qemu_refuses_leaves_no_memory_behind(racked: Racked) -> None:
    racked.node("one").refuses["device_add"] = 1
    with pytest.raises(QmpError):
        plug(racked)
    assert [command for command, _ in racked.node("one").said][-1] == "object-del"


def test_a_pull_waits_until_the_guest_has_let_go(racked: Racked) -> None:
    window = plug(racked)
    racked.node("one").refuses["object-del"] = 2
    assert fabric.pull(cast(Rack, racked), window) > 0
    commands = [command for command, _ in racked.node("one").said]
    assert commands[2:] == ["device_del", "object-del", "object-del", "object-del"]


def test_a_guest_that_holds_on_is_named_with_its_port(racked: Racked) -> None:
    window = plug(racked)
    racked.node("one").refuses["object-del"] = -1
    fabric.ask_back(cast(Rack, racked), window)
    with pytest.raises(HostError, match=r"'one' has not let go of .* 'spare' within 0.1 s: in use"):
        fabric.await_gone(cast(Rack, racked), window, timeout_s=0.1)
    commands = [command for command, _ in racked.node("one").said]
    assert commands.count("device_del") == 1  # waiting again presses no button twice


# -- rack.kill, rack.restart -----------------------------------------------------------------------


class Processes:
    """A keeper that notes what is done; a process ends when it is killed or stopped."""

    def __init__(self, *ended: str, stubborn: tuple[str, ...] = ()) -> None:
        self.exits = {name: Exit(name, 0, 0.0) for name in ended}
        self.stubborn = stubborn  # who does not end when it is asked to
        self.broken: tuple[str, ...] = ()  # who does not start
        self.done: list[str] = []

    def exit_of(self, name: str) -> Exit | None:
        return self.exits.get(name)

    def wait_exit(self, name: str, timeout_s: float) -> Exit | None:
        del timeout_s
        return self.exits.get(name)

    def kill(self, name: str) -> None:
        self.done.append(f"kill {name}")
        self.exits[name] = Exit(name, -9, 0.0)

    def stop(self, name: str) -> None:
        self.done.append(f"stop {name}")
        if name not in self.stubborn:
            self.exits[name] = Exit(name, 0, 0.0)

    def start(self, command: Any) -> None:
        name = command.node if isinstance(command, NodeCommand) else command.name
        if name in self.broken:
            raise LaunchError("no", node=name, exit_status=1, command=(), output="")
        self.done.append(f"start {name}")
        self.exits.pop(name, None)


class Returning:
    """A node that is started again."""

    def __init__(self, plan: RackPlan, done: list[str]) -> None:
        self.name = "two"
        self.plan = plan.nodes["two"]
        self._done = done

    def begin_again(self, command: NodeCommand) -> None:
        assert command.node == "two"
        self._done.append("forget")


def restart(monkeypatch: pytest.MonkeyPatch, keeper: Processes) -> list[str]:
    """What a restart of node two does, in order."""
    plan = plan_of()
    monkeypatch.setattr(deploy, "_await_hello", lambda *_: keeper.done.append("hello"))
    again = deploy._Restart(
        plan,
        cast(Any, keeper),
        lambda name: NodeCommand(name, ("qemu",)),
        Path("/nowhere"),
        deploy.StartOptions(router=False),
        lambda _: None,
    )
    again(cast(RackNode, Returning(plan, keeper.done)))
    return keeper.done


RETURN = ["start two.models", "forget", "start two", "hello"]


def test_a_machine_that_runs_is_killed_before_its_models_are_asked_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = restart(monkeypatch, Processes())
    assert done == ["kill two", "stop two.models", *RETURN]


def test_what_has_ended_is_not_ended_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert restart(monkeypatch, Processes("two", "two.models")) == RETURN
    assert restart(monkeypatch, Processes("two")) == ["stop two.models", *RETURN]


def test_models_that_do_not_end_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    done = restart(monkeypatch, Processes("two", stubborn=("two.models",)))
    assert done == ["stop two.models", "kill two.models", *RETURN]


def test_models_that_do_not_start_are_an_error_and_no_machine_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeper = Processes("two", "two.models")
    keeper.broken = ("two.models",)
    with pytest.raises(LaunchError):
        restart(monkeypatch, keeper)
    assert keeper.done == []


def test_only_who_started_a_rack_restarts_its_nodes(tmp_path: Path) -> None:
    keeper = SimpleNamespace(name="r", folder=tmp_path, run_folder=tmp_path, kill=lambda _: None)
    found = Rack(cast(Any, keeper), plan_of(), cast(Any, None), {}, owner=False)
    with pytest.raises(CapabilityMissing, match="restarting 'two': only who started the rack 'r'"):
        found.restart("two")
    with pytest.raises(NoSuchRack, match="has no node 'three'"):
        found.restart("three")
    with pytest.raises(NoSuchRack, match="several nodes"):
        found.kill()
    killed: list[str] = []
    keeper.kill = killed.append
    found.kill("one")
    assert killed == ["one"]
    began: list[str] = []
    ours = Rack(
        cast(Any, keeper),
        plan_of(),
        cast(Any, None),
        {},
        owner=True,
        restart=lambda node: began.append(node.name),
    )
    ours.restart("one")
    assert began == ["one"]
