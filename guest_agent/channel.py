# SPDX-License-Identifier: Apache-2.0
"""Life of the agent's process: protect stdout, say hello, serve calls, give everything back.

The hello leaves before the rest of the agent is loaded. Under an emulated CPU each import costs
10 to 100 ms (``json`` alone 0.35 s), and whoever waits for the machine should know at once that
it is alive.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from guest_agent.agent import Agent

PROTOCOL_VERSION = 1


class Ended(BaseException):
    """A signal asks the process to end; not an Exception, so that no handler swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _end(number: int, _frame: FrameType | None) -> None:
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # once: giving back must not be interrupted
    raise Ended(number)


def _hello(agent_hash: str) -> bytes:
    kernel = "".join(c for c in os.uname().release if c.isalnum() or c in "._+-~")
    return (
        f'{{"hello":{{"protocol":{PROTOCOL_VERSION},"agent":"{agent_hash}",'
        f'"kernel":"{kernel}","pid":{os.getpid()}}}}}\n'
    ).encode()


def get_ready(agent_hash: str) -> bytes:
    """All that an agent's process can do before it has a connection.

    From here on a stray print goes to stderr, and a signal raises :class:`Ended`.

    :returns: what it says first.
    """
    os.dup2(2, 1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _end)
    return _hello(agent_hash)


def serve(
    reading: int,
    writing: int,
    hello: bytes,
    before_serving: Callable[[], None] = lambda: None,
    agent: Agent | None = None,
) -> int:
    """Serve until ``reading`` ends, nobody reads what is written, or a signal comes.

    Whatever ends it, every driver binding, container, buffer and eventfd is given back.

    :param hello: from :func:`get_ready`.
    :param before_serving: called after the hello; calls wait for its end.
    :param agent: if it is made already.
    :returns: the process's exit status.
    """
    try:
        os.write(writing, hello)
        before_serving()
        if agent is None:
            from guest_agent.agent import Agent  # noqa: PLC0415  loaded after the hello

            agent = Agent()
        agent.serve(reading, writing)
    except ConnectionError:
        pass  # nobody reads the answers any more: as good as the end of what is read
    except Ended as ended:
        return 128 + ended.number
    finally:
        if agent is not None:
            for problem in agent.release():
                print(f"agent: {problem}", file=sys.stderr)  # noqa: T201  whoever is there sees it
    return 0


def run(agent_hash: str) -> int:
    """Serve on stdin and stdout; as :func:`serve`."""
    writing = os.dup(1)  # out of the way of stray prints
    return serve(0, writing, get_ready(agent_hash))
