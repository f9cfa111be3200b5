# SPDX-License-Identifier: Apache-2.0
"""A running rack: the one object that suites and users hold.

:func:`testbed.deploy.start` makes one from a topology, :func:`attach` finds one that an earlier
command left running. A rack has nodes; a node answers to its agent, to QMP, and shows the host its
devices' memory, its console and QEMU's words.
"""

from __future__ import annotations

import contextlib
import json
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from testbed.errors import (
    CapabilityMissing,
    HostError,
    LaunchError,
    LinkLost,
    LostError,
    NoSuchRack,
    TestbedError,
)
from testbed.host import paths
from testbed.machine import spawn
from testbed.machine.command import (
    AGENT_SOCKET,
    CONSOLE_LOG,
    CONSOLE_SOCKET,
    MODELS_SOCKET,
    QEMU_LOG,
    QMP_SOCKET,
    QMP_USER_SOCKET,
    SSH_SOCKET,
    NodeCommand,
)
from testbed.machine.console import Console, read_tail
from testbed.machine.lifecycle import StopDeadlines, Watch, stop_machine
from testbed.machine.models import Models
from testbed.machine.rack_record import RackRecord
from testbed.machine.registry import find

if TYPE_CHECKING:
    from testbed.guest.agent import AgentClient
    from testbed.guest.link import GuestLink
    from testbed.guest.ship import Agent
    from testbed.machine.client import Keeper
    from testbed.machine.qmp import Qmp
    from testbed.topology.model import Node, Topology
    from testbed.topology.plan import NodePlan, RackPlan

OBSERVATIONS_LOG = "observations.jsonl"
KEYS_FILE = "keys.json"
QMP_LOG = "qmp.log"


@dataclass(frozen=True)
class AccessKeys:
    """What it takes to enter a rack's machines: its client key and their host key."""

    client_private: str
    host_public: str

    def write(self, path: Path) -> None:
        """Keep them for later commands, readable by this user only.

        :raises HostError: they cannot be written: the disk is full, or the rack was ended.
        """
        try:
            path.touch(mode=0o600)
            path.write_text(json.dumps(vars(self)))
        except OSError as error:
            raise HostError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def read(cls, path: Path) -> AccessKeys:
        """What :meth:`write` wrote."""
        return cls(**json.loads(path.read_text()))


class RackNode:
    """One machine of a rack.

    :param command: what started it; in a rack of an earlier command, only whose it is.
    :param plan: its PCI functions and their addresses.
    :param spec: its part of the topology.
    :param keys: what it takes to log in, asked for when somebody does.
    :param aboard: the hash of the agent that it was booted with.
    """

    def __init__(
        self,
        keeper: Keeper,
        command: NodeCommand,
        plan: NodePlan,
        spec: Node,
        keys: Callable[[], AccessKeys],
        *,
        aboard: str,
        owner: bool,
    ) -> None:
        self.name = plan.name
        self.plan = plan
        self.spec = spec
        self.folder = keeper.folder / plan.name
        self.log_dir = keeper.run_folder / plan.name
        self.console = Console(self.log_dir / CONSOLE_LOG)
        self._keeper = keeper
        self.watch = self._watch(command)
        # A rack of an earlier command has been through its start.
        self.watch.control_answered = self.watch.hello_seen = not owner
        self._keys = keys
        self._aboard = aboard
        self._owner = owner
        self._lock = threading.RLock()
        self._link: GuestLink | None = None
        self._agent: AgentClient | None = None
        self._qmp: Qmp | None = None
        self._observations: BinaryIO | None = None

    def _watch(self, command: NodeCommand) -> Watch:
        return Watch(
            command,
            console=self.console,
            qemu_log=self.log_dir / QEMU_LOG,
            exit_of=lambda: self._keeper.exit_of(self.name),
        )

    def begin_again(self, command: NodeCommand) -> None:
        """Forget the machine that ended; another is about to start in its place."""
        self.close()
        self.console = Console(self.log_dir / CONSOLE_LOG)
        self.watch = self._watch(command)

    # -- ways in ---------------------------------------------------------------------------------

    @property
    def link(self) -> GuestLink:
        """The SSH connection, made on first use.

        :raises LostError: the machine or the link died.
        """
        with self._lock:
            if self._link is None or not self._link.alive:
                from testbed.guest.link import GuestLink  # noqa: PLC0415  (slow to import)

                keys = self._keys()
                try:
                    self._link = GuestLink(
                        self.name,
                        self.folder / SSH_SOCKET,
                        keys.client_private,
                        keys.host_public,
                    )
                except LinkLost as error:
                    raise self.blame(error) from error
            return self._link

    @property
    def agent(self) -> AgentClient:
        """The agent, started on first use and kept until :meth:`close`.

        :raises LostError: the machine or the link died before its hello.
        """
        with self._lock:
            if self._agent is None:
                from testbed.guest import ship  # noqa: PLC0415  (slow to import)

                agent = ship.local_agent()
                if self._owner:
                    # What it was booted with, even if someone edits the agent meanwhile.
                    agent = replace(agent, digest=self._aboard)
                self._agent = self.start_agent(agent)
            return self._agent

    def start_agent(self, agent: Agent) -> AgentClient:
        """Start one more agent process of this content, shipping it if the guest lacks it."""
        from testbed.guest import ship  # noqa: PLC0415  (slow to import)

        socket = self.folder / AGENT_SOCKET
        if agent.digest == self._aboard and socket.exists():
            client = ship.connect(self.name, socket, blame=self.blame, record=self._record)
        else:
            client = ship.start(self.link, agent, blame=self.blame, record=self._record)
        self.watch.hello_seen = True
        return client

    def introduce(self, identity: Iterable[bytes], timeout_s: float) -> None:
        """Tell a restored machine who it is, and await the hello of its first agent.

        :raises LostError: it cannot be that, or does not answer.
        """
        from testbed.guest import ship  # noqa: PLC0415  (slow to import)

        with self._lock:
            self._agent = ship.connect(
                self.name,
                self.folder / AGENT_SOCKET,
                blame=self.blame,
                record=self._record,
                first=identity,
                hello_timeout_s=timeout_s,
            )
            self.watch.hello_seen = True

    def restart_agent(self) -> None:
        """Forget an agent that died; the next use starts another."""
        with self._lock:
            if self._agent is not None:
                self._agent.close()
                self._agent = None

    def qmp(self, command: str, **arguments: Any) -> Any:
        """One QMP command of this machine's QEMU.

        :raises QmpError: QEMU refused it.
        :raises LostError: QEMU is gone or does not answer.
        """
        return self.monitor.execute(command, arguments or None)

    @property
    def monitor(self) -> Qmp:
        """The QMP connection, made on first use; the rack's owner and others have one each."""
        with self._lock:
            if self._qmp is None:
                from testbed.machine.qmp import Qmp  # noqa: PLC0415  (asyncio, slow to import)

                self._qmp = Qmp.connect(
                    self.folder / (QMP_SOCKET if self._owner else QMP_USER_SOCKET),
                    node=self.name,
                    check=self.watch.check,
                    transcript=self.log_dir / QMP_LOG,
                )
                self.watch.control_answered = True
            return self._qmp

    # -- what the host sees ----------------------------------------------------------------------

    def host_memory(self, function: str) -> mmap:
        """The VRAM called ``gpu0.vram``, as the host sees it: a witness beside the guest.

        :raises HostError: there is no such memory.
        """
        return self._keeper.open_memory(f"{self.name}/{function}")

    @property
    def models(self) -> Models:
        """The node's device models: what they saw, and what shall go wrong."""
        return Models(self.name, self.folder / MODELS_SOCKET)

    @property
    def console_socket(self) -> Path:
        """The serial console, for a person."""
        return self.folder / CONSOLE_SOCKET

    def console_tail(self, lines: int = 40) -> str:
        """The last lines of the serial console."""
        self.console.poll()
        return self.console.tail(lines)

    def qemu_log(self) -> str:
        """The end of what QEMU itself said."""
        return read_tail(self.log_dir / QEMU_LOG)

    @property
    def alive(self) -> bool:
        """QEMU runs and the guest kernel has not panicked."""
        try:
            self.watch.check()
        except (LostError, LaunchError):
            return False
        return True

    def blame(self, error: LinkLost) -> TestbedError:
        """Say why the link broke, as far as the console and QEMU's end tell."""
        return self.watch.blame(error)

    def _record(self, call: Mapping[str, Any]) -> None:
        line = json.dumps(call, separators=(",", ":")) + "\n"
        if self._observations is None:  # stays open: a suite makes hundreds of calls
            self._observations = (self.log_dir / OBSERVATIONS_LOG).open("ab")
            weakref.finalize(self, self._observations.close)
        self._observations.write(line.encode())
        self._observations.flush()

    def power_off(self, deadlines: StopDeadlines) -> str:
        """Agent, ACPI, QMP, kill: the first that works, within its deadline; returns which."""

        def ask_guest(timeout_s: float) -> None:
            self.link.run("poweroff -f", timeout_s=timeout_s)

        monitor = None
        with contextlib.suppress(LostError, LaunchError):
            monitor = self.monitor
        return stop_machine(
            self._keeper, self.name, agent=ask_guest, qmp=monitor, deadlines=deadlines
        ).value

    def close(self) -> None:
        """Let go of agent, SSH and QMP; the machine runs on. Safe to call twice."""
        with self._lock:
            for part in (self._agent, self._link, self._qmp):
                if part is not None:
                    with contextlib.suppress(LostError):
                        part.close()
            self._agent = self._link = self._qmp = None


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
