# SPDX-License-Identifier: Apache-2.0
"""Commands as the keeper wants them: a folder, a log and a JSON value for each."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed.errors import HostError
from testbed.machine.command import (
    CONSOLE_LOG,
    CONSOLE_SOCKET,
    LOG_LINK,
    QEMU_LOG,
    QMP_MODELS_SOCKET,
    QMP_SOCKET,
    QMP_USER_SOCKET,
    SSH_SOCKET,
    MemoryFd,
    NodeCommand,
)

# QEMU's own: it makes them anew.
SOCKETS = (QMP_SOCKET, QMP_USER_SOCKET, QMP_MODELS_SOCKET, SSH_SOCKET, CONSOLE_SOCKET)


@dataclass(frozen=True)
class HelperCommand:
    """A process that QEMU needs: it starts in ``node``'s runtime folder, in the order given.

    ``ready_file``  in that folder; the next process starts when it exists, so the helper makes it
    when it can be connected to (a server that makes its socket under another name and then renames
    it can use that). Its output goes to ``log/NAME.log``.

    ``nursed``  arguments for the device models' program, if a process that has imported it already
    may do the same as ``argv`` (:mod:`testbed.machine.nursery`).

    ``makes``  sockets and files that it makes there, and leaves behind if it is killed.
    """

    name: str
    node: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    memory: tuple[MemoryFd, ...] = ()
    ready_file: str = ""
    ready_timeout_s: float = 10.0
    makes: tuple[str, ...] = ()
    nursed: tuple[str, ...] = ()


Command = NodeCommand | HelperCommand


def make_node_folder(folder: Path, command: Command, run_folder: Path) -> None:
    """``NODE/`` in the rack's runtime ``folder``, with its link to ``run_folder/NODE``.

    What a process left that ended there is put away: its sockets are removed, for a client would
    wait at a dead one, and its ``console.log`` becomes ``console.1.log`` and so on, lest the next
    start's reader takes it for its own.

    :raises HostError: it cannot be made.
    """
    node = folder / command.node
    logs = run_folder / command.node
    try:
        make_folders(node, logs)
        for name in SOCKETS if isinstance(command, NodeCommand) else command.makes:
            (node / name).unlink(missing_ok=True)
        if isinstance(command, NodeCommand) and (logs / CONSOLE_LOG).exists():
            free = (logs / f"console.{number}.log" for number in itertools.count(1))
            (logs / CONSOLE_LOG).rename(next(path for path in free if not path.exists()))
    except OSError as error:
        raise HostError(f"cannot make {error.filename}: {error.strerror}") from error


def make_folders(node: Path, logs: Path) -> None:
    """A node's runtime folder, with its link to its logs. :raises OSError: it cannot be made."""
    logs.mkdir(parents=True, exist_ok=True)
    node.mkdir(mode=0o700, exist_ok=True)
    if not (node / LOG_LINK).is_symlink():
        (node / LOG_LINK).symlink_to(logs)


def _name(command: Command) -> str:
    return command.name if isinstance(command, HelperCommand) else command.node


def memory_name(command: Command, part: MemoryFd) -> str:
    """The rack's name for a node's memory, ``NODE/FUNCTION``."""
    return part.name if "/" in part.name else f"{command.node}/{part.name}"


@dataclass(frozen=True)
class Plan:
    """What a keeper is told to start: ``processes`` in their order, and the ``memory`` they share,
    by name: its size in bytes, or the path of the file that it is.
    """

    processes: list[dict[str, Any]]
    memory: dict[str, int | str]


def plan_of(folder: Path, commands: Iterable[Command], run_folder: Path) -> Plan:
    """Of a rack in the runtime folder ``folder``."""
    plan = Plan([], {})
    for command in commands:
        plan.processes.append(process_value(folder, command, run_folder))
        for part in command.memory:
            plan.memory[memory_name(command, part)] = part.file or part.size_bytes
    return plan


def process_value(folder: Path, command: Command, run_folder: Path) -> dict[str, Any]:
    """The command as :mod:`testbed.machine.keeper` wants it."""
    node = folder / command.node
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
    log, ready, ready_timeout_s = QEMU_LOG, "", 0.0
    if isinstance(command, HelperCommand):
        log = f"{command.name}.log"
        if command.ready_file:
            ready, ready_timeout_s = str(node / command.ready_file), command.ready_timeout_s
    nursed = command.nursed if isinstance(command, HelperCommand) else ()
    return {
        "name": _name(command),
        "kind": "helper" if isinstance(command, HelperCommand) else "qemu",
        "argv": list(command.argv),
        "environment": environment | dict(command.environment),
        "folder": str(node),
        "log": str(run_folder / command.node / log),
        "memory": [[part.fd, memory_name(command, part)] for part in command.memory],
        "ready": ready,
        "ready_timeout_s": ready_timeout_s,
        **({"nursed": list(nursed)} if nursed else {}),
    }
