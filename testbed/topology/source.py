# SPDX-License-Identifier: Apache-2.0
"""A topology file's text, places in it, and faults found at them."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field

from testbed.errors import Diagnostic, InputError

# What YAML 1.2 (5.1, c-printable) leaves out, and the two line breaks that only YAML 1.1 knew.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]"
)


@dataclass(frozen=True)
class Fault:
    """One thing wrong at ``index``, counted in characters from the text's start."""

    index: int
    message: str
    expected: str = ""
    nearest: str = ""


@dataclass(frozen=True)
class Source:
    """The text of ``name`` as read, with ``\\n`` at the end of each line."""

    name: str
    text: str
    _line_starts: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        starts = [0, *(match.end() for match in re.finditer("\n", self.text))]
        object.__setattr__(self, "_line_starts", starts)

    def position(self, index: int) -> tuple[int, int]:
        """Line and column, both from 1."""
        line = bisect.bisect_right(self._line_starts, index)
        return line, index - self._line_starts[line - 1] + 1

    def index(self, line: int) -> int:
        """Where a line, counted from 1, starts."""
        return self._line_starts[min(line, len(self._line_starts)) - 1]

    def diagnostic(self, fault: Fault) -> Diagnostic:
        """The fault, where a person finds it."""
        line, column = self.position(fault.index)
        return Diagnostic(self.name, line, column, fault.message, fault.expected, fault.nearest)

    def error(self, *faults: Fault) -> InputError:
        """All faults, each once and in the file's order, as one error to raise."""
        return InputError(diagnostics=sorted({self.diagnostic(fault) for fault in faults}))


def decode(name: str, content: bytes) -> Source:
    """Bytes to a Source; InputError at the first byte that is not UTF-8 or not printable."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig")
        message = f"byte 0x{content[error.start]:02x} is not UTF-8"
        source = Source(name, before.replace("\r\n", "\n"))
        raise source.error(Fault(len(source.text), message, expected="text in UTF-8")) from None
    source = Source(name, re.sub("\r\n?", "\n", text))
    match = _UNPRINTABLE.search(source.text)
    if match:
        message = f"the character U+{ord(match.group()):04X} is not allowed in YAML"
        raise source.error(Fault(match.start(), message))
    return source
