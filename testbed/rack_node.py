# SPDX-License-Identifier: Apache-2.0
"""One machine of a running rack: its ways in, and what the host sees of it."""

from __future__ import annotations

import contextlib
import json
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from testbed.errors import (
    HostError,
    LaunchError,
    LinkLost,
    LostError,
    TestbedError,
)
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

if TYPE_CHECKING:
    from testbed.guest.agent import AgentClient
    from testbed.guest.link import GuestLink
    from testbed.guest.ship import Agent
    from testbed.machine.client import Keeper
    from testbed.machine.qmp import Qmp
    from testbed.topology.model import Node
    from testbed.topology.plan import NodePlan

OBSERVATIONS_LOG = "observations.jsonl"
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
