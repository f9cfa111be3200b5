# SPDX-License-Identifier: Apache-2.0
"""A running rack: the one object that suites and users hold.

:func:`testbed.deploy.start` makes one from a topology, :func:`attach` finds one that an earlier
command left running. A rack has nodes; a node answers to its agent, to QMP, and shows the host its
devices' memory, its console and QEMU's words.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from testbed.errors import CapabilityMissing, NoSuchRack
from testbed.host import paths
from testbed.machine import spawn
from testbed.machine.command import NodeCommand
from testbed.machine.lifecycle import StopDeadlines
from testbed.machine.rack_record import RackRecord
from testbed.machine.registry import find
from testbed.rack_node import AccessKeys, RackNode

if TYPE_CHECKING:
    from testbed.machine.client import Keeper
    from testbed.topology.model import Topology
    from testbed.topology.plan import RackPlan

KEYS_FILE = "keys.json"
NodeCall = Callable[[RackNode], Any]


class Rack:
    """A running rack. As a context manager it ends, if this process owns it; else it is let go.

    :ivar plan: where everything stands; :ivar topology: as resolved; :ivar run_dir: its logs.
    :ivar versions: what it runs on (QEMU, kernel, image, their hashes).
    """

    def __init__(
        self,
        keeper: Keeper,
        plan: RackPlan,
        keys: Callable[[], AccessKeys],
        versions: Mapping[str, Any],
        *,
        owner: bool,
        commands: Mapping[str, NodeCommand] | None = None,
        restart: NodeCall | None = None,
    ) -> None:
        self._restart = restart
        self.name = keeper.name
        self.plan = plan
        self.topology: Topology = plan.topology
        self.run_dir = keeper.run_folder
        self.versions = dict(versions)
        self.owner = owner
        self.keeper = keeper
        self.nodes: dict[str, RackNode] = {
            name: RackNode(
                keeper,
                (commands or {}).get(name) or NodeCommand(name, ()),
                node,
                plan.topology.nodes[name],
                keys,
                aboard=str(versions.get("agent", "")),
                owner=owner,
            )
            for name, node in plan.nodes.items()
        }

    @property
    def alive(self) -> bool:
        """Every node runs."""
        return all(node.alive for node in self.nodes.values())

    def node(self, name: str = "") -> RackNode:
        """The node of that name; the only one if ``name`` is empty.

        :raises NoSuchRack: there is no such node, or several and none was named.
        """
        if not name and len(self.nodes) == 1:
            return next(iter(self.nodes.values()))
        if name in self.nodes:
            return self.nodes[name]
        raise NoSuchRack(
            f"rack '{self.name}' has no node '{name}'"
            if name
            else f"rack '{self.name}' has several nodes",
            hint="its nodes: " + ", ".join(f"{self.name}/{node}" for node in self.nodes),
        )

    def kill(self, name: str = "") -> None:
        """SIGKILL to a node's QEMU, as if the machine had lost its power."""
        self.keeper.kill(self.node(name).name)

    def restart(self, name: str = "") -> None:
        """Boot a node again, with device models of its own again, whatever state it is in.

        What a GPU's memory holds stays; who holds an agent, a device or a mapping of it must get
        another. The other nodes run on: their links to it go down, and up again.

        :raises CapabilityMissing: another command started the rack.
        :raises HostError, LostError: as when a rack starts.
        """
        node = self.node(name)
        if self._restart is None:
            raise CapabilityMissing(
                f"restarting '{node.name}': only who started the rack '{self.name}' can"
            )
        self._restart(node)

    def stop(self, deadlines: StopDeadlines | None = None) -> dict[str, str]:
        """End the rack. Safe to call twice.

        :param deadlines: ask every guest to power off first, then QEMU to quit, each that long;
            without them QEMU is killed: nothing in a guest is worth waiting for.
        :returns: by node, which step ended it.
        """
        how = dict.fromkeys(self.nodes, "kill")
        try:
            if deadlines is not None:
                how |= on_all(self, lambda node: node.power_off(deadlines))
        finally:
            try:
                # First: who still waits for an answer of a node has it locked until its machine
                # ends.
                self.keeper.shutdown()
            finally:
                for node in self.nodes.values():
                    node.close()
                self.keeper.close()
        return how

    def detach(self) -> None:
        """Let the rack outlive this process; :func:`attach` finds it again."""
        self.keeper.detach()
        self.owner = False

    def close(self) -> None:
        """Let go; a rack that this process owns ends. Safe to call twice."""
        if self.owner:
            self.stop()
            return
        for node in self.nodes.values():
            node.close()
        self.keeper.close()

    def __enter__(self) -> Rack:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def record_of(rack: Rack, created_s: float, keys_file: Path) -> RackRecord:
    """What a later command must know to :func:`attach`."""
    from testbed.topology import model  # noqa: PLC0415

    return RackRecord(
        name=rack.name,
        run_folder=rack.run_dir,
        nodes=tuple(rack.nodes),
        created_s=created_s,
        keys_file=keys_file,
        topology=model.to_data(rack.topology),
        versions=rack.versions,
    )


def attach(name: str) -> Rack:
    """The rack that an earlier command started.

    :raises NoSuchRack: none of that name runs, or its start has not finished.
    """
    from testbed.topology import model, placement  # noqa: PLC0415

    base = paths.runtime_dir()
    record = find(base, name).record
    if record is None or record.keys_file is None:
        raise NoSuchRack(f"the rack '{name}' is still being started")
    keys = AccessKeys.read(record.keys_file)
    # Placement is a pure function of the topology as resolved: nothing else need be kept.
    plan = placement.place(model.from_data(record.topology))
    keeper = spawn.attach(base, name)
    return Rack(keeper, plan, lambda: keys, record.versions, owner=False)


def split_name(word: str) -> tuple[str, str]:
    """``rack/node`` or ``rack`` → (rack, node or "")."""
    rack, _, node = word.partition("/")
    return rack, node


def on_all(rack: Rack, call: NodeCall) -> dict[str, Any]:
    """Do ``call`` on every node at once; the first error is raised after all have ended.

    An interrupt waits for none of them: closing the rack ends their machines, and so the calls.
    """
    from concurrent.futures import Future, wait  # noqa: PLC0415

    def run(node: RackNode, answer: Future[Any]) -> None:
        try:
            answer.set_result(call(node))
        except BaseException as error:  # raised where it is waited for
            answer.set_exception(error)

    answers: dict[str, Future[Any]] = {}
    for name, node in rack.nodes.items():
        answers[name] = Future()
        # Daemons: an executor's threads would hold up the end of an interrupted process.
        threading.Thread(target=run, args=(node, answers[name]), daemon=True).start()
    wait(answers.values())
    return {name: answer.result() for name, answer in answers.items()}
