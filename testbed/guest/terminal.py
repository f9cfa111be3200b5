# SPDX-License-Identifier: Apache-2.0
"""A person's terminal on a shell in the guest."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
from collections.abc import Iterator

import paramiko

from testbed.terminal import raw


def interact(channel: paramiko.Channel, stdin: int = 0, stdout: int = 1) -> int:
    """Join the terminal and ``channel`` until either ends; the shell's exit status."""
    channel.settimeout(0.0)
    with contextlib.closing(channel), raw(stdin), _follow_size(channel):
        sources: list[paramiko.Channel | int] = [channel, stdin]
        while True:
            ready, _, _ = select.select(sources, [], [], 1.0)
            if channel in ready:
                data = channel.recv(1 << 16)
                if not data:
                    break
                _write(stdout, data)
            if stdin in ready:
                typed = os.read(stdin, 1 << 12)
                if typed:
                    channel.sendall(typed)
                else:
                    channel.shutdown_write()
                    sources.remove(stdin)
            if channel.closed:
                break
        return channel.recv_exit_status() if channel.exit_status_ready() else -1


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def _follow_size(channel: paramiko.Channel) -> Iterator[None]:
    if not sys.stdout.isatty():
        yield
        return

    def resized(_signal: int, _frame: object) -> None:
        size = shutil.get_terminal_size()
        with contextlib.suppress(paramiko.SSHException):
            channel.resize_pty(size.columns, size.lines)

    before = signal.signal(signal.SIGWINCH, resized)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
