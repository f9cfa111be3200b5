# SPDX-License-Identifier: Apache-2.0
"""The process that a command's keepers are forks of: it has imported what each would import.

Run by :mod:`testbed.machine.early` like a keeper, ``python -I -S -c MOTHER ROOT [MODULE]``, for a
command that starts several racks. Descriptor 0 is a socket to the command: each message is the name
of a module that the keeper's nursling will be (``-``: none), with the keeper's own socket; the
answer is its process number, with a pidfd. Its end of file is her end.

A keeper is not the command's child, so the command waits for the pidfd, and she reaps. It does not
die with her, for it may outlive the command; it is in a session of its own, and holds nothing of
hers. She holds nothing of a keeper's but the pidfd.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import sys

from testbed.machine import early, keeper_main
from testbed.machine.children import above, close_fds
from testbed.machine.nursery import rename

TYPE_CHECKING = False  # typing's, without the rest of it
if TYPE_CHECKING:
    from typing import NoReturn

NONE = b"-"
MAX_MODULE_BYTES = 256


def main() -> None:
    """Bear keepers until the command is gone; the last word may be what they will need."""
    os.umask(0o077)
    close_fds({0, 1, 2})
    Mother(sys.argv[-1] if len(sys.argv) > 2 else "").run()


class Mother:
    """Her loop: requests, and keepers that end.

    :param module: imported before anyone asks.
    """

    def __init__(self, module: str) -> None:
        self._wire = socket.socket(fileno=above(0))
        os.dup2(1, 0)  # the null device: number 0 has a meaning to each keeper
        self._keepers: dict[int, int] = {}  # process numbers by pidfd
        self._poll = select.poll()
        self._poll.register(self._wire, select.POLLIN)
        gc.freeze()
        self._learn(module)

    def run(self) -> None:
        """Until the command is gone."""
        while True:
            for fd, _ in self._poll.poll():
                if fd != self._wire.fileno():
                    self._reap(fd)
                elif not self._answer():
                    for ended in list(self._keepers):
                        os.waitpid(self._keepers[ended], os.WNOHANG)
                    os._exit(0)  # what was imported need not be taken apart

    def _learn(self, module: str) -> None:
        if module and module not in sys.modules:
            # A nursling meets the error again, and has a log to say it in.
            with contextlib.suppress(Exception):
                __import__(module)
            gc.freeze()  # or looking for garbage would write all over the pages that forks share

    def _reap(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        os.waitpid(self._keepers.pop(pidfd), 0)
        os.close(pidfd)

    def _answer(self) -> bool:
        """One request; False at the end of file."""
        word, fds, _, _ = socket.recv_fds(self._wire, MAX_MODULE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        if not word:
            return False
        module = "" if word == NONE else word.decode()
        self._learn(module)
        try:
            pid = os.fork()
            if not pid:
                self._become_keeper(fds[0], module)
            pidfd = os.pidfd_open(pid)
            self._keepers[pidfd] = pid
            self._poll.register(pidfd, select.POLLIN)
            socket.send_fds(self._wire, [str(pid).encode()], [pidfd])
        except OSError as error:  # the command does without
            with contextlib.suppress(OSError):
                self._wire.send(str(error).encode())
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _become_keeper(self, owner: int, module: str) -> NoReturn:
        """As :func:`testbed.machine.early._start` starts one."""
        status = 1
        try:
            os.setsid()
            os.dup2(owner, 0)
            self._wire.detach()  # closed with all the rest
            rename([sys.executable, "-I", "-S", "-c", early.LAUNCHER, early.ROOT, module])
            keeper_main.live(module)
            status = 0
        except SystemExit:
            status = 0  # its owner needs no rack
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
