# SPDX-License-Identifier: Apache-2.0
"""Unix sockets whose path may be of any length, and one JSON question over one.

A socket's name in the kernel is at most 107 bytes (unix(7)), a runtime folder's path may be more.
Linux resolves ``/proc/self/fd/N/name`` like any path, so an open folder makes every name short.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for ``path`` that fits a socket address, valid inside the context.

    :raises OSError: its folder does not exist.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def connect_unix(path: Path, timeout_s: float) -> socket.socket:
    """A connection to the stream socket at ``path``; ``timeout_s`` stays set on it.

    :raises OSError: nobody listens there, or the queue of its listener stays full.
    """
    wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        wire.settimeout(timeout_s)
        with short_path(path) as name:
            wire.connect(name)
    except BaseException:
        wire.close()
        raise
    return wire


def peer_pid(wire: socket.socket) -> int:
    """The process that listens at the other end (SO_PEERCRED), whether it answers or not."""
    credentials = wire.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def ask(path: Path, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """One JSON line there, one back.

    :raises OSError: no connection, no answer in time (TimeoutError), or the end of the stream.
    :raises ValueError: the answer is no JSON object.
    """
    deadline_s = time.monotonic() + timeout_s
    with connect_unix(path, timeout_s) as wire:
        wire.sendall(json.dumps(question).encode() + b"\n")
        line = bytearray()
        while not line.endswith(b"\n"):
            wire.settimeout(max(0.001, deadline_s - time.monotonic()))
            data = wire.recv(1 << 16)
            if not data:
                raise ConnectionResetError(f"{path}: closed before it answered")
            line += data
    answer = json.loads(line)
    if not isinstance(answer, dict):
        raise ValueError(f"{path}: answered {type(answer).__name__}")
    return answer
