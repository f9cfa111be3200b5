# SPDX-License-Identifier: Apache-2.0
"""Files of strangers: read with bounds on size and time, and quoted so that they cannot do harm."""

from __future__ import annotations

import codecs
import re
import sys
import time
from pathlib import Path

from testbed.errors import Diagnostic, InputError
from testbed.topology.problem import nearest
from testbed.topology.source import Fault, Source

STDIN = "-"
# `lspci -vvv -xxxx` of a machine with a thousand functions is half of this.
MOST_FILE_BYTES = 32 << 20
MOST_SECONDS = 60.0

_TERMINAL_COLOURS = re.compile("\x1b\\[[0-9;]{0,16}[A-Za-z]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_BOMS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class Deadline:
    """The time that reading one file may take."""

    def __init__(self, name: str, seconds: float = MOST_SECONDS) -> None:
        self._name = name
        self._seconds = seconds
        self._end_s = time.monotonic() + seconds

    def check(self) -> None:
        """InputError once the time is over."""
        if time.monotonic() > self._end_s:
            raise InputError(f"{self._name}: reading it takes longer than {self._seconds:g} s")


def read(path: str) -> tuple[str, bytes]:
    """The name to use in messages, and the bytes of a file or, for ``-``, of standard input."""
    name = "<stdin>" if path == STDIN else path
    try:
        if path == STDIN:
            content = sys.stdin.buffer.read(MOST_FILE_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                content = file.read(MOST_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        message = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(
            diagnostics=[Diagnostic(name, 0, 0, message, nearest=_neighbour(path, error))]
        ) from None
    if len(content) > MOST_FILE_BYTES:
        raise InputError(f"{name}: larger than {MOST_FILE_BYTES >> 20} MiB")
    return name, content


def _neighbour(path: str, error: Exception) -> str:
    folder = Path(path).parent
    if not isinstance(error, FileNotFoundError) or not folder.is_dir():
        return ""
    return nearest(Path(path).name, (entry.name for entry in folder.iterdir()))


def decode(name: str, content: bytes) -> Source:
    """Text without colours and with plain line ends; InputError where it is no text."""
    encoding = next((e for bom, e in _BOMS.items() if content.startswith(bom)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        before = content[: error.start].decode(encoding, "replace")
        source = Source(name, before.replace("\r\n", "\n"))
        message = (
            f"byte 0x{content[error.start]:02x} is not {encoding.removesuffix('-sig').upper()}"
        )
        raise source.error(Fault(len(source.text), message, "text")) from None
    text = re.sub("\r\n?", "\n", _TERMINAL_COLOURS.sub("", text))
    source = Source(name, text)
    control = _CONTROL.search(text)
    if control:
        message = f"the control character U+{ord(control.group()):04X}"
        raise source.error(Fault(control.start(), message, "text"))
    return source


def plain(text: str, most: int = 60) -> str:
    """A stranger's words, fit for a message or a comment in a template: one line, no braces."""
    text = text[: 4 * most].translate(_BRACES)
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return words if len(words) <= most else words[: most - 3].rstrip() + "..."


_BRACES = str.maketrans("{}", "()")


def fault_at(name: str, line: int, column: int, message: str, expected: str = "") -> InputError:
    """One fault at a place that a parser knows by line and column, both from 1."""
    return InputError(diagnostics=[Diagnostic(name, line, column, message, expected)])
