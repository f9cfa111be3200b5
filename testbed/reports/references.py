# SPDX-License-Identifier: Apache-2.0
"""``${name.field}``: what an earlier step saw, or where a device stands. No other expressions.

What is known before anything runs is the template's (``{{ }}``, as in a topology); what only the
running machine knows is a reference. A value that is one reference has the type of what was seen,
and a number may be added to it (``${peer.iova+0x1000}``); within a text it becomes text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from testbed.errors import TestbedError

Seen = bool | int | float | str
Scope = Mapping[str, Mapping[str, Any]]  # what each name has seen, field by field

_ANY = re.compile(r"\$\{([^}\n]*)\}?")
_INNER = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)\.([A-Za-z0-9_-]+)(?: *\+ *(0x[0-9A-Fa-f]+|[0-9]+))?")


class ReferenceFault(TestbedError):
    """A reference has no value, or one with which nothing can be done."""


@dataclass(frozen=True)
class Reference:
    """One ``${name.field+added}``; ``wrong`` if it is none (then the other fields say nothing)."""

    text: str
    name: str = ""
    field: str = ""
    added: int = 0
    wrong: bool = False


def references(text: str) -> Iterator[Reference]:
    """All in a text, in order."""
    for found in _ANY.finditer(text):
        inner = _INNER.fullmatch(found[1])
        if inner is None or not found[0].endswith("}"):
            yield Reference(found[0], wrong=True)
        else:
            yield Reference(found[0], inner[1], inner[2], int(inner[3] or "0", 0))


def resolve(value: Any, scope: Scope) -> Any:
    """The value with its references put in; lists and mappings through and through.

    :raises ReferenceFault: something was not seen.
    """
    if isinstance(value, str):
        found = list(references(value))
        if len(found) == 1 and found[0].text == value:
            return _seen(found[0], scope)
        return _ANY.sub(lambda _: str(_seen(found.pop(0), scope)), value)
    if isinstance(value, Mapping):
        return {key: resolve(each, scope) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [resolve(each, scope) for each in value]
    return value


def _seen(reference: Reference, scope: Scope) -> Any:
    fields = scope.get(reference.name, {})
    if reference.field not in fields:
        raise ReferenceFault(f"{reference.text} was not seen")
    value = fields[reference.field]
    if not reference.added:
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ReferenceFault(f"{reference.text}: {value!r} is no number")
    return value + reference.added
