# SPDX-License-Identifier: Apache-2.0
"""Renders a topology's template and remembers from where in the file each character came.

While Jinja2 reads the template, a mark is put at the start of each line of plain text, after each
tag and before each ``{{``: two control characters, which YAML does not allow in a file, around a
number. Wherever loops then carry a text, its marks go with it; they are taken out at the end and
leave a map from the rendered text to the file.
"""

from __future__ import annotations

import bisect
import re
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateSyntaxError, UndefinedError
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream

from testbed.topology.problem import listing, nearest
from testbed.topology.source import Fault, Source
from testbed.topology.template_limits import Environment, bounded_output, restrict

_MARK = re.compile("\x02([0-9]+)\x03")
_TAGS = ("{{", "{%", "{#")
_FILE_NAME = "<topology>"


@dataclass(frozen=True)
class Rendered:
    """The YAML text, and the way back to the file.

    ``starts``   where in the text a new piece starts, ascending.
    ``origins``  where in the file that piece came from; ``literal`` pieces go on there character by
                 character, the others are the value of an expression that starts there.
    """

    text: str
    starts: tuple[int, ...]
    origins: tuple[int, ...]
    literal: tuple[bool, ...]

    def source_index(self, index: int) -> int:
        """The place in the file that the character at ``index`` came from."""
        piece = max(0, bisect.bisect_right(self.starts, index) - 1)
        offset = index - self.starts[piece] if self.literal[piece] else 0
        return self.origins[piece] + offset


def render(source: Source, variables: Mapping[str, Any]) -> Rendered:
    """The template's result; InputError with the line if it has a fault or is out of bounds."""
    if not any(tag in source.text for tag in _TAGS):
        return Rendered(source.text, (0,), (0,), (True,))
    environment = Environment()
    marker = _Marker(environment)
    environment.extensions[marker.identifier] = marker
    try:
        marker.prepare(source.text)
        tree = environment.parse(source.text, filename=_FILE_NAME)
        restrict(tree)
        code = environment.compile(tree, filename=_FILE_NAME)
    except TemplateSyntaxError as error:
        index = _first_tag(source, error.lineno)
        raise source.error(Fault(index, f"template: {error.message}")) from None
    template = Template.from_code(environment, code, environment.globals)
    try:
        marked = bounded_output(template.root_render_func(template.new_context(dict(variables))))
    except Exception as error:
        raise source.error(_runtime_fault(error, template, source, variables)) from None
    return _without_marks(marked, marker)


class _Marker(Extension):
    """Puts the marks in, between Jinja2's lexer and its parser."""

    identifier = "testbed.topology.template.marker"

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.origins: list[int] = []
        self.literal: list[bool] = []
        self._offsets: Iterator[int] = iter(())

    def prepare(self, text: str) -> None:
        """Find where each text and each ``{{`` starts, which Jinja2's tokens do not tell."""
        offsets: list[int] = []
        offset = 0
        for _, kind, value in self.environment.lexer.tokeniter(text, None, _FILE_NAME):
            # Only white space that a tag swallows is missing between tokens, and always before a
            # tag, never before a text: a text starts where the last token ended.
            start = offset if kind == "data" else text.index(value, offset)
            if kind in ("data", "variable_begin"):
                offsets.append(start)
            offset = start + len(value)
        self._offsets = iter(offsets)

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """Jinja2's hook: the tokens, marked."""
        for token in stream:
            if token.type == "data":
                yield Token(token.lineno, "data", self._mark_lines(token.value))
            elif token.type == "variable_begin":
                yield Token(token.lineno, "data", self._mark(next(self._offsets), literal=False))
                yield token
            else:
                yield token

    def _mark_lines(self, text: str) -> str:
        offset = next(self._offsets)
        marked = []
        for line in text.split("\n"):
            marked.append(self._mark(offset, literal=True) + line)
            offset += len(line) + 1
        return "\n".join(marked)

    def _mark(self, origin: int, *, literal: bool) -> str:
        self.origins.append(origin)
        self.literal.append(literal)
        return f"\x02{len(self.origins) - 1}\x03"


def _without_marks(marked: str, marker: _Marker) -> Rendered:
    pieces: list[str] = []
    starts: list[int] = []
    numbers: list[int] = []
    length = 0
    # Between marks stands text: re.split yields text, number, text, number, ... text.
    parts = _MARK.split(marked)
    for number, piece in zip(parts[1::2], parts[2::2], strict=True):
        starts.append(length)
        numbers.append(int(number))
        pieces.append(piece)
        length += len(piece)
    return Rendered(
        "".join(pieces),
        tuple(starts),
        tuple(marker.origins[number] for number in numbers),
        tuple(marker.literal[number] for number in numbers),
    )


def _first_tag(source: Source, line: int) -> int:
    """Where the first tag of a line starts; Jinja2 tells lines only."""
    start = source.index(line)
    text = source.text[start:].partition("\n")[0]
    columns = [text.index(tag) for tag in _TAGS if tag in text]
    return start + min(columns, default=len(text) - len(text.lstrip()))


def _runtime_fault(
    error: Exception, template: Template, source: Source, variables: Mapping[str, Any]
) -> Fault:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == _FILE_NAME and frame.lineno]
    line = template.get_corresponding_lineno(lines[-1]) if lines else 1
    index = _first_tag(source, line)
    name = re.match("'([^']+)' is undefined", str(error))
    if isinstance(error, UndefinedError) and name:
        text = source.text[source.index(line) :].partition("\n")[0]
        word = re.search(rf"\b{re.escape(name[1])}\b", text)
        index = source.index(line) + word.start() if word else index
        known = listing(variables) if variables else "a variable from 'vars:'"
        return Fault(index, f"template: {error}", known, nearest(name[1], variables))
    return Fault(index, f"template: {error}")
