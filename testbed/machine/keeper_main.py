# SPDX-License-Identifier: Apache-2.0
"""A keeper's process before it has a rack; :mod:`testbed.machine.keeper` is what it is with one.

Run by :mod:`testbed.machine.early` as ``python -I -S -c LAUNCHER ROOT [MODULE]``: isolated,
without site-packages, standard library only and no pathlib: the start of every rack waits for it.
Or forked by a process that has imported all of that (:mod:`testbed.machine.keeper_mother`).

It may run before its owner knows of any rack, and has a child import MODULE meanwhile
(:mod:`testbed.machine.nursery`). The owner's first line, ``{"rack": NAME, "folder": FOLDER}``,
says which rack it keeps, and brings descriptors 2 and 3.
"""

from __future__ import annotations

import json
import os
import socket
import sys

from testbed.machine.children import above, close_fds
from testbed.machine.keeper import LOCK_FD, Keeper
from testbed.machine.nursery import Nursling

MAX_RACK_BYTES = 1 << 16  # the line that says which rack


def main() -> None:
    """Keep a rack to its end; the last word of the command line may be a module to nurse."""
    os.umask(0o077)
    live(sys.argv[-1] if len(sys.argv) > 2 else "")


def live(module: str) -> None:
    """The same, with the owner's socket as descriptor 0 and nothing but the null device else."""
    close_fds({0, 1, 2})
    nursling = Nursling(module) if module else None
    name, folder = _await_rack()
    Keeper(name, folder, nursling).run()


def _await_rack() -> tuple[str, str]:
    """The rack's name and folder, with its log and lock as descriptors 2 and 3.

    :raises SystemExit: the owner needs no rack.
    """
    with socket.socket(fileno=os.dup(0)) as wire:
        line, fds, _, _ = socket.recv_fds(wire, MAX_RACK_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
    if not line or len(fds) != 2:
        sys.exit(0)
    moved = [above(fd) for fd in fds]  # they may have got number 3 themselves
    for fd in fds:
        os.close(fd)
    os.dup2(moved[0], 2)
    os.dup2(moved[1], LOCK_FD, inheritable=False)
    for fd in moved:
        os.close(fd)
    rack = json.loads(line)
    return rack["rack"], rack["folder"]
