# SPDX-License-Identifier: Apache-2.0
"""A person at a machine's serial console."""

from __future__ import annotations

import os
import selectors
import socket
from enum import StrEnum
from pathlib import Path

from testbed.errors import LinkLost
from testbed.machine.sockets import connect_unix
from testbed.terminal import raw

ESCAPE = b"\x1d"  # Ctrl-]
CONNECT_TIMEOUT_S = 5.0


class ConsoleEnd(StrEnum):
    """Why :func:`attach_console` returned."""

    ESCAPE = "escape"
    INPUT = "input"  # our standard input ended
    MACHINE = "machine"  # QEMU closed the console


def attach_console(path: Path, *, node: str, stdin: int = 0, stdout: int = 1) -> ConsoleEnd:
    """Connect the terminal to the console socket at ``path`` until Ctrl-] or the machine's end.

    A terminal is raw meanwhile (Ctrl-C goes to the guest) and is restored whatever happens.

    :raises LinkLost: nobody listens there.
    """
    try:
        wire = connect_unix(path, CONNECT_TIMEOUT_S)
    except OSError as error:
        raise LinkLost(f"{node}: no console ({error.strerror or error})", node=node) from error
    with wire, raw(stdin):
        return _copy(wire, stdin, stdout)


def _copy(wire: socket.socket, stdin: int, stdout: int) -> ConsoleEnd:
    wire.settimeout(None)
    # Not epoll, which refuses regular files (`testbed console < script`).
    with selectors.PollSelector() as selector:
        selector.register(wire, selectors.EVENT_READ)
        selector.register(stdin, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if wire in ready:
                try:
                    said = wire.recv(1 << 16)
                except ConnectionError:
                    said = b""
                if not said:
                    return ConsoleEnd.MACHINE
                while said:
                    said = said[os.write(stdout, said) :]
            if stdin in ready:
                typed, escape, _ = os.read(stdin, 1 << 12).partition(ESCAPE)
                try:
                    wire.sendall(typed)
                except OSError:
                    return ConsoleEnd.MACHINE
                if escape:
                    return ConsoleEnd.ESCAPE
                if not typed:
                    return ConsoleEnd.INPUT
