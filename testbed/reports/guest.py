# SPDX-License-Identifier: Apache-2.0
"""A command of a report in the guest's shell: a deadline there and here, and bounded output."""

from __future__ import annotations

import contextlib
import shlex
import time
from typing import Any

from testbed.errors import LinkLost, TestbedError

KEPT_BYTES = 16 << 10  # of each stream; the rest is read and forgotten
_GRACE_S = 10.0
_POLL_S = 0.02
_CHUNK_BYTES = 1 << 16
_KILLED = (-1, 128 + 9, 128 + 15)

_CONFIG = "/sys/bus/pci/devices/{bdf}/config"


def run_command(node: Any, command: str, timeout_s: int) -> dict[str, Any]:
    """``{status, stdout, stderr, timed_out}`` of a command for ``sh -c``; killed after its time.

    :raises LostError: the machine or the link died, or the guest does not end it.
    """
    began_s = time.monotonic()
    line = f"timeout -s KILL {timeout_s} sh -c {shlex.quote(command)}"
    channel = node.link.open_channel(line)
    out, err = bytearray(), bytearray()
    with contextlib.closing(channel):
        channel.shutdown_write()
        channel.settimeout(_POLL_S)
        while not (channel.exit_status_ready() and channel.eof_received):
            _drain(channel, out, err)
            node.watch.check()
            if time.monotonic() - began_s > timeout_s + _GRACE_S:
                raise node.blame(LinkLost(f"{node.name}: '{command}' did not end", node=node.name))
            if not node.link.alive:
                raise node.blame(LinkLost(f"{node.name}: the SSH connection died", node=node.name))
        while _drain(channel, out, err):
            pass
        status = channel.recv_exit_status()
    return {
        "status": status,
        "stdout": _text(out),
        "stderr": _text(err),
        "timed_out": status in _KILLED and time.monotonic() - began_s >= timeout_s,
    }


def read_config(node: Any, bdf: str, offset: int, width: int) -> int:
    """A word of the configuration space, by sysfs."""
    return int(_python(node, bdf, f"print(int.from_bytes(os.pread(f,{width},{offset}),'little'))"))


def write_config(node: Any, bdf: str, offset: int, width: int, value: int) -> None:
    """Write a word of the configuration space, by one access."""
    _python(node, bdf, f"os.pwrite(f,({value}).to_bytes({width},'little'),{offset})")


def _python(node: Any, bdf: str, statement: str) -> str:
    path = _CONFIG.format(bdf=bdf)
    program = f"import os;f=os.open('{path}',os.O_RDWR);{statement}"
    done = run_command(node, f"python3 -I -S -c {shlex.quote(program)}", 20)
    if done["status"]:
        last = done["stderr"].strip().rpartition("\n")[2]
        raise TestbedError(f"configuration space of {bdf}: {last or done['status']}")
    return str(done["stdout"])


def _drain(channel: Any, out: bytearray, err: bytearray) -> bool:
    """Read what is there, waiting a moment for more; False if nothing came."""
    some = False
    if channel.recv_stderr_ready():
        some = _keep(err, channel.recv_stderr(_CHUNK_BYTES))
    with contextlib.suppress(TimeoutError):
        some = _keep(out, channel.recv(_CHUNK_BYTES)) or some
    return some


def _keep(kept: bytearray, chunk: bytes) -> bool:
    kept += chunk[: KEPT_BYTES - len(kept)]
    return bool(chunk)


def _text(data: bytearray) -> str:
    return data.decode(errors="replace").rstrip("\n")
