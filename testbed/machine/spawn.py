# SPDX-License-Identifier: Apache-2.0
"""The host's side of a rack's processes: start them, find them again, end them.

:func:`start_keeper` for a rack of this command, :func:`attach` for one of an earlier command,
:func:`end_rack` for `down`. What they return is a :class:`~testbed.machine.client.Keeper`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from testbed.errors import HostError, NoSuchRack
from testbed.machine import early
from testbed.machine import keeper as keeper_module
from testbed.machine.client import (
    CALL_TIMEOUT_S,
    END_TIMEOUT_S,
    KEEPER_LOG,
    START_TIMEOUT_S,
    Exit,
    Keeper,
)
from testbed.machine.processes import (
    Command,
    HelperCommand,
    Plan,
    make_node_folder,
    plan_of,
)
from testbed.machine.registry import Reservation, clean, find
from testbed.machine.sockets import connect_unix, peer_pid

__all__ = [
    "Command",
    "Exit",
    "HelperCommand",
    "Keeper",
    "attach",
    "end_rack",
    "plan_of",
    "start_keeper",
]


def start_keeper(
    reservation: Reservation, commands: Sequence[Command], *, run_folder: Path
) -> Keeper:
    """Start a keeper, and by it the ``commands`` in their order; the rack is then the keeper's.

    Makes ``NODE/`` in the runtime folder and its ``log`` link to ``run_folder/NODE``. Shared memory
    is the rack's: the same name (``NODE/FUNCTION``) given to two processes is the same memory.

    :returns: when all processes run, and all helpers are ready.
    :raises LaunchError: one could not be executed, or a helper was not ready in time.
    :raises HostError: no folder, no memory, no keeper.
    """
    run_folder = run_folder.resolve()
    for command in commands:
        make_node_folder(reservation.folder, command, run_folder)
    plan = plan_of(reservation.folder, commands, run_folder)
    keeper = launch(reservation, plan, run_folder)
    begin(keeper, plan)
    return keeper


def begin(keeper: Keeper, plan: Plan) -> None:
    """Have a keeper that was launched start its processes; errors as :func:`start_keeper`."""
    waits_s = sum(process["ready_timeout_s"] for process in plan.processes)
    try:
        keeper.start_all(plan.processes, plan.memory, START_TIMEOUT_S + waits_s)
    except BaseException:
        keeper.close()
        raise


def attach(base: Path, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Keeper:
    """A rack that an earlier command started.

    :raises NoSuchRack: no rack of that name runs.
    :raises HostError: its keeper does not answer within ``timeout_s``.
    """
    info = find(base, name)
    run_folder = info.record.run_folder if info.record else info.folder
    try:
        wire = connect_unix(info.folder / keeper_module.SOCKET, timeout_s)
    except OSError as error:
        raise NoSuchRack(f"the rack '{name}' ended just now") from error
    keeper = Keeper(name, info.folder, run_folder, wire, pid=peer_pid(wire))
    try:
        keeper.subscribe(timeout_s)
    except BaseException:
        keeper.close()
        raise
    return keeper


def end_rack(base: Path, name: str, *, timeout_s: float = END_TIMEOUT_S) -> None:
    """End a rack however its keeper feels, and remove its folder.

    :raises NoSuchRack: no rack of that name runs.
    :raises HostError: it is still there after ``timeout_s`` and SIGKILL.
    """
    folder = find(base, name).folder
    with contextlib.suppress(OSError):  # it ended meanwhile
        wire = connect_unix(folder / keeper_module.SOCKET, CALL_TIMEOUT_S)
        keeper = Keeper(name, folder, folder, wire, pid=peer_pid(wire))
        try:
            keeper.shutdown(timeout_s)
        finally:
            keeper.close()
    clean(base)


def launch(reservation: Reservation, plan: Plan, run_folder: Path) -> Keeper:
    """A keeper that has the rack, and has started nothing yet.

    :raises HostError: no keeper.
    """
    path = run_folder / KEEPER_LOG
    nursed = any("nursed" in process for process in plan.processes)
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            started = early.take(early.MODELS if nursed else "")
            rack = {"rack": reservation.name, "folder": str(reservation.folder)}
            line = json.dumps(rack).encode()
            try:
                socket.send_fds(started.wire, [line], [log, reservation.lock_fd])
            except BaseException:
                started.close()
                raise
        finally:
            os.close(log)
    except OSError as error:
        raise HostError(
            f"cannot start the rack's keeper: {error.strerror} ({path} must be writable)"
        ) from error
    keeper = Keeper(
        reservation.name,
        reservation.folder,
        run_folder,
        started.wire,
        pid=started.pid,
        ended=started.ended,
    )
    reservation.hand_over()
    return keeper
