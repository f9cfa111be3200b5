# SPDX-License-Identifier: Apache-2.0
"""What a person's terminal needs, whichever room of the house it is joined to."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from collections.abc import Iterator


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """A terminal passes every key on (Ctrl-C is the guest's), and is restored at the end.

    What is no terminal (a pipe, a file) stays as it is.
    """
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
