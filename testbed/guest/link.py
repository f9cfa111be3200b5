# SPDX-License-Identifier: Apache-2.0
"""SSH into a machine over the unix socket that QEMU forwards to the guest's port 22.

There is no TCP port on the host at all: two racks, two users and two checkouts cannot collide, and
nobody outside the runtime folder (mode 0700) can connect. The host key is the rack's own, made
before the machine was, so the first connection is already authenticated both ways.
"""

from __future__ import annotations

import contextlib
import io
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import paramiko

from testbed.errors import LinkLost

# The guest's address space is emulated and its CPU often too: a key exchange that takes 50 ms on
# metal takes up to a second there.
CONNECT_TIMEOUT_S = 20.0
RETRY_PAUSE_S = 0.1


@dataclass(frozen=True)
class CommandResult:
    """What a command in the guest ended with; ``exit_status`` is -1 if it died of a signal."""

    exit_status: int
    stdout: bytes
    stderr: bytes


class GuestLink:
    """One authenticated SSH connection to one machine.

    :param node: the node's name, for messages.
    :param ssh_socket: the unix socket that QEMU forwards to the guest's port 22.
    :param private_key: the rack's client key, OpenSSH PEM text.
    :param host_key: the guest's expected public host key, ``ssh-ed25519 AAAA…``.
    :raises LinkLost: no authenticated connection within ``timeout_s``.
    """

    def __init__(
        self,
        node: str,
        ssh_socket: Path,
        private_key: str,
        host_key: str,
        *,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self.node = node
        self._key = paramiko.Ed25519Key.from_private_key(io.StringIO(private_key))
        self._host_key = host_key.split()[1]
        self._transport = self._connect(ssh_socket, timeout_s)

    def _connect(self, ssh_socket: Path, timeout_s: float) -> paramiko.Transport:
        deadline = time.monotonic() + timeout_s
        last = "no attempt was made"
        while (left := deadline - time.monotonic()) > 0:
            try:
                return self._attempt(ssh_socket, left)
            except (OSError, EOFError, paramiko.SSHException) as error:
                # The forward accepts before the guest does, so a refusal looks like a broken
                # banner. Until the deadline that only means "not yet".
                last = str(error) or type(error).__name__
            time.sleep(min(RETRY_PAUSE_S, max(0.0, deadline - time.monotonic())))
        raise LinkLost(
            f"{self.node}: no SSH connection within {timeout_s:.0f} s (last: {last})",
            node=self.node,
        )

    def _attempt(self, ssh_socket: Path, left_s: float) -> paramiko.Transport:
        wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        transport: paramiko.Transport | None = None
        try:
            wire.settimeout(left_s)
            wire.connect(str(ssh_socket))
            transport = paramiko.Transport(wire)
            transport.banner_timeout = left_s
            transport.start_client(timeout=left_s)
            self._check_host_key(transport)
            transport.auth_timeout = left_s
            transport.auth_publickey("root", self._key)
        except BaseException:
            if transport is not None:
                transport.close()
            wire.close()
            raise
        return transport

    def _check_host_key(self, transport: paramiko.Transport) -> None:
        offered = transport.get_remote_server_key().get_base64()
        if offered != self._host_key:
            raise LinkLost(
                f"{self.node}: the machine that answered has another host key than this rack's",
                node=self.node,
            )

    @property
    def alive(self) -> bool:
        """The connection stands as far as this side knows."""
        return self._transport.is_active()

    def open_channel(
        self, command: str, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> paramiko.Channel:
        """Start ``command`` (a line for the guest's shell) and return its channel.

        :raises LinkLost: the connection is gone or no channel could be had in time.
        """
        try:
            channel = self._transport.open_session(timeout=timeout_s)
            channel.settimeout(timeout_s)
            channel.exec_command(command)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise LinkLost(f"{self.node}: no SSH channel ({error})", node=self.node) from error
        return channel

    def run(self, command: str, *, stdin: bytes = b"", timeout_s: float = 60.0) -> CommandResult:
        """Run ``command`` in the guest's shell to its end.

        :raises LinkLost: it did not end within ``timeout_s`` or the connection died.
        """
        channel = self.open_channel(command)
        deadline = time.monotonic() + timeout_s
        stdout, stderr = bytearray(), bytearray()
        with contextlib.closing(channel):
            try:
                if stdin:
                    channel.sendall(stdin)
                channel.shutdown_write()
                # paramiko has one event for "something arrived"; waiting on stdout alone would
                # block while only stderr talks, so both are drained in turns.
                channel.settimeout(0.05)
                while not (channel.exit_status_ready() and channel.eof_received):
                    if time.monotonic() > deadline:
                        raise LinkLost(
                            f"{self.node}: '{command}' did not end within {timeout_s:.0f} s",
                            node=self.node,
                        )
                    if not self._transport.is_active():
                        raise LinkLost(f"{self.node}: the SSH connection died", node=self.node)
                    self._drain(channel, stdout, stderr)
                while self._drain(channel, stdout, stderr):
                    pass
                return CommandResult(channel.recv_exit_status(), bytes(stdout), bytes(stderr))
            except OSError as error:
                raise LinkLost(
                    f"{self.node}: the SSH channel broke ({error})", node=self.node
                ) from error

    @staticmethod
    def _drain(channel: paramiko.Channel, stdout: bytearray, stderr: bytearray) -> bool:
        """Take what is there, waiting a moment for stdout; true if anything came."""
        before = len(stdout) + len(stderr)
        while channel.recv_stderr_ready():
            stderr += channel.recv_stderr(1 << 16)
        with contextlib.suppress(TimeoutError):
            stdout += channel.recv(1 << 16)
        return len(stdout) + len(stderr) > before

    def shell(self, term: str, columns: int, lines: int) -> paramiko.Channel:
        """An interactive shell on a terminal of that size, for `testbed ssh`."""
        try:
            channel = self._transport.open_session(timeout=CONNECT_TIMEOUT_S)
            channel.get_pty(term=term, width=columns, height=lines)
            channel.invoke_shell()
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise LinkLost(f"{self.node}: no SSH channel ({error})", node=self.node) from error
        return channel

    def close(self) -> None:
        """End the connection; safe to call twice."""
        self._transport.close()

    def __enter__(self) -> GuestLink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
