# SPDX-License-Identifier: Apache-2.0
"""What suites need of a rack, as protocols: :mod:`testbed.rack` has them, and so has a fake."""

from __future__ import annotations

from collections.abc import Mapping
from mmap import mmap
from pathlib import Path
from typing import Any, Protocol

from testbed.errors import LinkLost, TestbedError
from testbed.topology.model import Topology
from testbed.topology.plan import NodePlan, RackPlan


class Agent(Protocol):
    """The agent in one node's guest."""

    def call(self, method: str, timeout_s: float = 30.0, /, **params: Any) -> Any:
        """One call; AgentError if it failed there, LostError if the machine or link died."""


class Models(Protocol):
    """One node's device models."""

    def call(self, method: str, **params: Any) -> Any:
        """What a device saw, or what shall go wrong; DeviceLost, HostError."""


class CommandResult(Protocol):
    """What a command in the guest ended with."""

    @property
    def exit_status(self) -> int:
        """Its exit status; -1 if a signal killed it."""

    @property
    def stdout(self) -> bytes:
        """All that it printed."""

    @property
    def stderr(self) -> bytes:
        """All that it complained."""


class Channel(Protocol):
    """A command that runs in the guest."""

    def settimeout(self, timeout: float | None, /) -> None:
        """Bounds :meth:`recv`, which then raises TimeoutError."""

    def recv(self, nbytes: int, /) -> bytes:
        """Some of its standard output, or none at the end."""

    def exit_status_ready(self) -> bool:
        """It has ended."""

    def recv_exit_status(self) -> int:
        """Its exit status, -1 if there is none."""

    def close(self) -> None:
        """Let go of it."""


class Link(Protocol):
    """A way to start commands in the guest; LinkLost if it broke."""

    def open_channel(self, command: str, *, timeout_s: float = 20.0) -> Channel:
        """Start a line for the guest's shell."""

    def run(self, command: str, *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        """Run one to its end."""


class RackNode(Protocol):
    """One machine of a running rack."""

    @property
    def name(self) -> str:
        """Its name in the topology."""

    @property
    def plan(self) -> NodePlan:
        """Its PCI tree."""

    @property
    def agent(self) -> Agent:
        """Its agent."""

    @property
    def link(self) -> Link:
        """Its shell, for programs that are not the agent."""

    def blame(self, error: LinkLost) -> TestbedError:
        """Why the link broke: the machine's end, if that was it."""

    @property
    def models(self) -> Models:
        """Its device models, if it has some."""

    @property
    def alive(self) -> bool:
        """QEMU runs and the guest kernel has not panicked."""

    def qmp(self, command: str, **arguments: Any) -> Any:
        """One command to QEMU; QmpError if it refuses, LostError if it is gone."""

    def console_tail(self, lines: int = 40) -> str:
        """The last lines of the serial console."""

    @property
    def folder(self) -> Path:
        """QEMU's working directory; it goes away with the rack."""

    @property
    def log_dir(self) -> Path:
        """Where its logs grow; QEMU's traces are in ``QEMU_LOG`` there."""

    def host_memory(self, function: str) -> mmap:
        """The video memory of ``gpu0.vram`` as the host sees it, without the guest's help."""


class Rack(Protocol):
    """A running rack."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def plan(self) -> RackPlan:
        """Where everything stands."""

    @property
    def topology(self) -> Topology:
        """What it was made from."""

    @property
    def run_dir(self) -> Path:
        """Where its logs are."""

    @property
    def versions(self) -> Mapping[str, Any]:
        """What it was made with: QEMU, kernel, image, and their hashes."""

    @property
    def nodes(self) -> Mapping[str, RackNode]:
        """Its machines, by name."""

    def close(self) -> None:
        """End all machines; idempotent."""


class RackSource(Protocol):
    """Where a run's racks come from."""

    @property
    def topology(self) -> Topology:
        """The rack under test, before anything is started."""

    @property
    def plan(self) -> RackPlan:
        """Its placement, before anything is started."""

    @property
    def restartable(self) -> bool:
        """A fresh rack can take a dead one's place (not so for a rack that others started)."""

    def start(self, topology: Topology, label: str, *, disks: bool = True) -> Rack:
        """Boot a rack; called from several threads at once. LaunchError, LostError.

        :param disks: False: nobody will look at its disks, which need not have their driver.
        """
