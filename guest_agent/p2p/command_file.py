# SPDX-License-Identifier: Apache-2.0
"""Device files that take commands (guest_agent/kmod/common): a line in, lines out."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BOUNCE_BYTES = 4096
BOUNCE_OFFSET = 0x100000  # where in such a file the memory is that its device copies from and to
ANSWER_BYTES = 8192


def open_file(module: str) -> int:
    """A descriptor of the module's file. Raises OSError(ENOENT): the module is not loaded."""
    return os.open(f"/dev/{module}", os.O_RDWR | os.O_CLOEXEC)


def tell(fd: int, words: str) -> list[dict[str, Any]]:
    """The answer's lines; numbers are integers. Raises OSError: the command makes no sense."""
    try:
        os.pwrite(fd, words.encode(), 0)
        text = os.pread(fd, ANSWER_BYTES, 0).decode()
    except OSError as error:
        raise OSError(error.errno, f"{words}: {error.strerror}") from None
    return [
        {key: _value(value) for key, value in (word.split("=", 1) for word in line.split())}
        for line in text.splitlines()
    ]


def ask_all(module: str, words: str) -> list[dict[str, Any]]:
    """The answer's lines to one command, which needs no file that stays open."""
    fd = open_file(module)
    try:
        return tell(fd, words)
    finally:
        os.close(fd)


def ask(module: str, words: str) -> dict[str, Any]:
    """The first line of what :func:`ask_all` answers."""
    return ask_all(module, words)[0]


def _value(word: str) -> int | str:
    try:
        return int(word, 0)
    except ValueError:
        return word
