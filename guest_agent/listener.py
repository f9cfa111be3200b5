# SPDX-License-Identifier: Apache-2.0
"""Who is there first in a machine: waits for connections, and makes a process for each.

``python3 -ISu …/guest_agent/__main__.py listen``, started by init, goes to the background once it
listens on the address of QEMU's user network, which leads to two sockets in the rack's runtime
folder (mode 0700) and nowhere else. Behind one each connection gets an agent of its own, forked:
nothing is started or imported anew, and no keys are exchanged. Behind the other it is an SSH
server's, for whoever wants a shell; none runs until then.

``… listen saved [FUNCTION…]`` is the end of a boot that is to be saved (:mod:`guest_agent.resume`):
it loads all of the agent first, and makes the first agent, which waits: to it the first connection
of the restored machine says who that is.
"""

from __future__ import annotations

import _socket
import os
import select
import signal
import sys

from guest_agent import channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

ADDRESS = "10.0.2.15"  # images/init gives it to the card of QEMU's user network
AGENT_PORT = 1022  # testbed/machine/argv.py forwards to both
SSH_PORT = 22
READY = "testbed: ready"  # testbed/machine/console.py looks for it
BACKLOG = 16
# Keys only (-s), for one connection that is there already (-i).
SSH_SERVER = ("dropbear", "-i", "-s", "-j", "-k", "-r", "/etc/dropbear/host_key")


def run(agent_hash: str, words: list[str]) -> int:
    """Listen; returns in the process that init waits for."""
    # ruff: noqa: RET503  the process in the background serves for ever
    agents, shells = (_listen(port) for port in (AGENT_PORT, SSH_PORT))
    if os.fork():
        return 0
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if words[:1] == ["saved"]:
        from guest_agent import resume  # noqa: PLC0415  a machine that is booted need not have it

        resume.get_ready(words[1:])
        became = _first_agent(agents, shells, agent_hash)
        resume.wait()
        _await(became)
        os.close(became)
        resume.reseed()
    _say(READY)
    _serve(agents, shells, agent_hash)


def _first_agent(agents: _socket.socket, shells: _socket.socket, agent_hash: str) -> int:
    """Fork the agent to which the first connection says who this machine is.

    What it does after that connection is new to the restored machine's QEMU, which has to translate
    it: so it does all else before.

    :returns: what can be read when this machine is that; it waits for its connection.
    """
    from guest_agent import resume  # noqa: PLC0415

    became, says = os.pipe()
    if os.fork():
        os.close(says)
        resume.let_go()
        _await(became)  # nothing of what it does before is left for the restored machine
        return became
    status = 1
    try:
        os.close(became)
        shells.close()
        hello = _become_agent(agent_hash)
        agent = resume.first_agent()
        os.write(says, b"\n")
        wire = _accept(agents)
        agents.close()
        if not resume.answer(wire):

            def before_serving() -> None:
                try:
                    resume.settle(wire)
                except Exception as error:  # whoever looks at the console may know more
                    os.write(2, f"{type(error).__name__}: {error}\n".encode())
                    raise
                os.write(says, b"\n")
                os.close(says)

            status = channel.serve(wire, wire, hello, before_serving, agent)
    finally:
        _end(status)


def _await(became: int) -> None:
    """Until the first agent is one step further; a machine where it is gone is no other's."""
    if not os.read(became, 1):
        from guest_agent import resume  # noqa: PLC0415

        _say(resume.UNFIT)
        os._exit(1)


def _listen(port: int) -> _socket.socket:
    listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
    listener.bind((ADDRESS, port))
    listener.listen(BACKLOG)
    return listener


def _accept(listener: _socket.socket) -> int:
    wire, _ = listener._accept()  # type: ignore[attr-defined]  # what socket.accept calls
    return int(wire)


def _say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def _serve(agents: _socket.socket, shells: _socket.socket, agent_hash: str) -> NoReturn:
    # The kernel reaps them; who asks after children of its own sets this back.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        for listener in select.select([agents, shells], [], [])[0]:
            try:
                wire = _accept(listener)
            except OSError:
                continue  # it went away again
            if listener is agents:
                _agent(wire, agent_hash, (agents, shells))
            else:
                actions = [(os.POSIX_SPAWN_DUP2, wire, fd) for fd in (0, 1)]
                signals = [signal.SIGCHLD, signal.SIGHUP]
                os.posix_spawnp(
                    SSH_SERVER[0],
                    SSH_SERVER,
                    os.environ,
                    file_actions=actions,
                    setsigdef=signals,
                    setsid=True,
                )
            os.close(wire)


def _agent(wire: int, agent_hash: str, ours: tuple[_socket.socket, ...]) -> None:
    """Fork an agent that speaks over ``wire``."""
    if os.fork():
        return
    status = 1
    try:
        hello = _become_agent(agent_hash)
        for listener in ours:
            listener.close()
        status = channel.serve(wire, wire, hello)
    finally:
        _end(status)


def _become_agent(agent_hash: str) -> bytes:
    """Be a process of its own. :returns: what it says first."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return channel.get_ready(agent_hash)


def _end(status: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(status)
