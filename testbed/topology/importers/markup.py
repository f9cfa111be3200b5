# SPDX-License-Identifier: Apache-2.0
"""XML to a tree of elements that know their line and column.

Python's expat binding is used directly, because ElementTree forgets places. What makes XML
dangerous is refused where it starts: a document type with declarations of its own (entities),
nesting, and numbers of elements that no real file has. External files are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn
from xml.parsers import expat

from testbed.topology.importers.source import Deadline, fault_at, plain

MOST_LEVELS = 64
MOST_ELEMENTS = 200_000
_CHECK_EVERY = 4096

_WHOLE_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(slots=True)
class Element:
    """One element; ``text`` is its own character data, joined."""

    file: str
    tag: str
    attributes: dict[str, str]
    line: int
    column: int
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def get(self, name: str) -> str:
        """An attribute, or ""."""
        return self.attributes.get(name, "")

    def each(self, *tags: str) -> Iterator[Element]:
        """The children with one of these tags."""
        return (child for child in self.children if child.tag in tags)

    def fail(self, message: str, expected: str = "") -> NoReturn:
        """Raise an InputError that shows this element's place."""
        raise fault_at(self.file, self.line, self.column, message, expected)

    def number(self, name: str, least: int, most: int) -> int:
        """An attribute that must be a whole number within bounds."""
        text = self.get(name)
        if not _WHOLE_NUMBER.fullmatch(text) or not least <= int(text) <= most:
            self.fail(
                f'<{plain(self.tag)}> has {name}="{plain(text)}"',
                f"a whole number from {least} to {most}",
            )
        return int(text)


def parse(name: str, content: bytes) -> Element:
    """The root element; InputError with the place of the first fault."""
    return _Reader(name).read(content)


class _Reader:
    def __init__(self, name: str) -> None:
        self._name = name
        self._root: Element | None = None
        self._open: list[Element] = []
        self._texts: list[list[str]] = []
        self._count = 0
        self._deadline = Deadline(name)
        self._expat = expat.ParserCreate()
        self._expat.buffer_text = True
        self._expat.StartElementHandler = self._start
        self._expat.EndElementHandler = self._end
        self._expat.CharacterDataHandler = self._characters
        self._expat.StartDoctypeDeclHandler = self._doctype
        self._expat.SkippedEntityHandler = self._skipped_entity

    def read(self, content: bytes) -> Element:
        """The root of the document in ``content``."""
        try:
            self._expat.Parse(content, True)
        except expat.ExpatError as error:
            message = f"not XML: {expat.ErrorString(error.code)}"
            raise fault_at(self._name, error.lineno, error.offset + 1, message) from None
        except (ValueError, LookupError) as error:
            # The declaration names an encoding that Python has not, or that expat cannot take.
            self._fail(f"not XML that can be read: {plain(str(error))}", "UTF-8")
        if self._root is None:
            self._fail("not XML: there is no element")
        return self._root

    def _fail(self, message: str, expected: str = "") -> NoReturn:
        line, column = self._expat.CurrentLineNumber, self._expat.CurrentColumnNumber + 1
        raise fault_at(self._name, line, column, message, expected) from None

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count % _CHECK_EVERY == 0:
            self._deadline.check()
        if self._count > MOST_ELEMENTS:
            self._fail(f"more than {MOST_ELEMENTS} elements")
        if len(self._open) >= MOST_LEVELS:
            self._fail(f"elements nest more than {MOST_LEVELS} deep")
        line, column = self._expat.CurrentLineNumber, self._expat.CurrentColumnNumber + 1
        element = Element(self._name, tag, attributes, line, column)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self._root = element
        self._open.append(element)
        self._texts.append([])

    def _end(self, _tag: str) -> None:
        self._open.pop().text = "".join(self._texts.pop())

    def _characters(self, text: str) -> None:
        if not text.isspace():
            self._texts[-1].append(text)

    def _doctype(
        self, _name: str, _system: str | None, _public: str | None, has_declarations: int
    ) -> None:
        if has_declarations:
            self._fail("a document type with declarations of its own, such as entities")

    def _skipped_entity(self, name: str, _is_parameter: bool) -> None:
        self._fail(f"the entity '{plain(name)}', which nothing declares")
