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


def _take_stdout() -> int:
    """Move the protocol's descriptor out of the way, so that a stray print goes to stderr."""
    protocol = os.dup(1)
    os.dup2(2, 1)
    return protocol


def _hello(agent_hash: str) -> bytes:
    kernel = "".join(c for c in os.uname().release if c.isalnum() or c in "._+-~")
    return (
        f'{{"hello":{{"protocol":{PROTOCOL_VERSION},"agent":"{agent_hash}",'
        f'"kernel":"{kernel}","pid":{os.getpid()}}}}}\n'
    ).encode()


def run(agent_hash: str, before_serving: Callable[[], None] = lambda: None) -> int:
    """Serve until stdin ends, the reader of stdout is gone, or a signal comes.

    Whatever ends it, every driver binding, container, buffer and eventfd is given back.

    :param before_serving: called after the hello; calls wait for its end.
    :returns: the process's exit status.
    """
    protocol = _take_stdout()
    agent = None
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, _end)
        os.write(protocol, _hello(agent_hash))
        before_serving()
        from guest_agent.agent import Agent  # noqa: PLC0415  loaded after the hello

        agent = Agent()
        agent.serve(0, protocol)
    except ConnectionError:
        pass  # nobody reads the answers any more: as good as the end of stdin
    except Ended as ended:
        return 128 + ended.number
    finally:
        if agent is not None:
            for problem in agent.release():
                print(f"agent: {problem}", file=sys.stderr)  # noqa: T201  stdout is the protocol
    return 0
