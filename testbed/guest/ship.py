# SPDX-License-Identifier: Apache-2.0
"""An agent in a machine, by its content's hash.

A machine that was booted by this checkout has the agent in its initial RAM disk, and a listener
that makes one for each connection (``guest_agent/listener.py``): :func:`connect`. Any other (an
older rack, or the agent was edited since) is sent it and starts it, over SSH: :func:`start`. A
folder per hash lets two checkouts hold agents in one machine.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import LinkLost
from testbed.guest.agent import HELLO_TIMEOUT_S, AgentClient
from testbed.host import agent as agent_files
from testbed.host import paths
from testbed.machine.sockets import connect_unix

if TYPE_CHECKING:
    from testbed.guest.link import GuestLink


@dataclass(frozen=True)
class Agent:
    """The agent's sources, and the hash that names them."""

    source: Path
    digest: str

    @property
    def guest_folder(self) -> str:
        """Where it stands in a machine."""
        return f"{agent_files.GUEST_FOLDER}/{self.digest}"

    def archive(self) -> bytes:
        """Its sources as an uncompressed tar, `guest_agent/…`."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for path in agent_files.sources(self.source):
                tar.add(path, f"{agent_files.PACKAGE}/{path.relative_to(self.source)}")
        return buffer.getvalue()


@lru_cache(maxsize=1)
def local_agent() -> Agent:
    """This checkout's (or this installation's) agent."""
    source = paths.data_dir("guest_agent")
    return Agent(source, agent_files.agent_hash(source))


def connect(
    node: str,
    socket: Path,
    *,
    blame: Callable[[LinkLost], BaseException],
    record: Callable[[Mapping[str, Any]], None] | None = None,
    first: Iterable[bytes] = (),
    hello_timeout_s: float = HELLO_TIMEOUT_S,
) -> AgentClient:
    """A new agent of the machine behind ``socket``, which was booted with it.

    :param first: what it is told; made while it gets there.
    :raises LostError: as ``blame`` says, if no hello comes in time.
    """
    with contextlib.ExitStack() as unless_it_answers:
        try:
            wire = connect_unix(socket, hello_timeout_s)
            unless_it_answers.callback(wire.close)
            for message in first:
                wire.sendall(message)
        except OSError as error:
            raise blame(LinkLost(f"{node}: no way to the agent ({error})", node=node)) from error
        client = AgentClient(
            node, wire, blame=blame, record=record, hello_timeout_s=hello_timeout_s
        )
        unless_it_answers.pop_all()
    return client


def start(
    link: GuestLink,
    agent: Agent,
    *,
    blame: Callable[[LinkLost], BaseException],
    record: Callable[[Mapping[str, Any]], None] | None = None,
    hello_timeout_s: float = HELLO_TIMEOUT_S,
) -> AgentClient:
    """Start the agent in the machine at the other end of ``link`` and await its hello.

    :raises LostError: as ``blame`` says, if no hello comes in time.
    """
    try:
        _send_if_missing(link, agent)
        channel = link.open_channel(
            f"exec python3 -ISu {agent.guest_folder}/guest_agent/__main__.py"
        )
    except LinkLost as error:
        raise blame(error) from error
    return AgentClient(
        link.node, channel, blame=blame, record=record, hello_timeout_s=hello_timeout_s
    )


def _send_if_missing(link: GuestLink, agent: Agent) -> None:
    folder = agent.guest_folder
    if link.run(f"test -e {folder}/guest_agent/__main__.py").exit_status == 0:
        return
    sent = link.run(f"mkdir -p {folder} && tar -xf - -C {folder}", stdin=agent.archive())
    if sent.exit_status != 0:
        why = sent.stderr.decode(errors="replace").strip()
        raise LinkLost(f"{link.node}: the agent could not be sent: {why}", node=link.node)
