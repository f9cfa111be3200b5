# SPDX-License-Identifier: Apache-2.0
"""A child of the keeper that has imported a program before anyone knows what it shall do.

The device models' imports take as long as all that a start works out meanwhile. So the keeper, the
first thing that a start starts, forks a child for them; when the rack's processes are known, the
child is told its folder, arguments and descriptors, and is the models' process from then on, as if
it had been executed. It shares the interpreter's pages with the keeper.

Part of the keeper's process, so standard library only, and no pathlib.
"""
# ruff: noqa: PTH112, PTH123

from __future__ import annotations

import array
import ctypes
import json
import os
import signal
import socket
import sys

from testbed.machine.children import above, become_child, close_fds, descriptors_in_place

TYPE_CHECKING = False  # typing's, without the rest of it
if TYPE_CHECKING:
    from typing import Any, NoReturn

MAX_MESSAGE_BYTES = 1 << 16
MAX_FDS = 253  # SCM_MAX_FD, include/net/scm.h


class Nursling:
    """The child, as the keeper sees it; made by forking.

    :param module: its ``main(arguments)`` is the program.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        keeper = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            _live(module, theirs, keeper)
        theirs.close()
        # Low numbers are given a meaning by the keeper.
        low, self._ours = self._ours, socket.socket(fileno=above(self._ours.fileno()))
        low.close()

    def begin(self, spec: dict[str, Any], memory: dict[str, tuple[int, int]]) -> bool:
        """Let it be this process; False if it cannot: then it is to be executed.

        :raises OSError: the log cannot be made.
        """
        wanted = spec["nursed"]
        if len(spec["memory"]) + 1 > MAX_FDS or not os.path.isdir(spec["folder"]):
            return False
        log = os.open(spec["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            places = [1, *(int(fd) for fd, _ in spec["memory"])]
            sources = [log, *(memory[name][0] for _, name in spec["memory"])]
            message = {"folder": spec["folder"], "arguments": wanted, "places": places}
            socket.send_fds(self._ours, [json.dumps(message).encode()], sources)
        except OSError:
            return False  # it has died
        finally:
            os.close(log)
            self._ours.close()
        return True

    def end(self) -> None:
        """Nobody needs it."""
        self._ours.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _live(module: str, wire: socket.socket, keeper: int) -> NoReturn:
    status = 1
    try:
        become_child(keeper)
        close_fds({1, 2, wire.fileno()})
        os.open(os.devnull, os.O_RDONLY)  # as descriptor 0
        try:
            program, problem = __import__(module, fromlist=["main"]), None
        except Exception as error:  # said in its log, as soon as it has one
            problem = error
        fds = array.array("i")
        data, ancillary, _, _ = wire.recvmsg(
            MAX_MESSAGE_BYTES, socket.CMSG_SPACE(MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
        if data:
            for _, _, content in ancillary:
                fds.frombytes(content)
            wire.close()
            message = json.loads(data)
            os.chdir(message["folder"])
            wanted = dict(zip(message["places"], fds, strict=True))
            wanted[2] = wanted[1]
            descriptors_in_place(wanted | {0: 0})
            rename([sys.executable, module, *message["arguments"]])
            if problem is not None:
                raise problem
            status = program.main(message["arguments"])
    except BaseException as error:  # its log is all that it has
        os.write(2, f"{module}: {type(error).__name__}: {error}\n".encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def rename(words: list[str]) -> None:
    """Let `ps` say what this process is, in the room that the keeper's own words take."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: proc_pid_stat(5)
    text = b"\0".join(word.encode() for word in words)[: end - begin - 1]
    if begin:
        ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)
