# SPDX-License-Identifier: Apache-2.0
"""A fault in a topology, at a place in its data; the loader knows where that is in the file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DataPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One fault, as a value.

    ``path``    keys and list indexes from the top of the topology's data to the value at fault, or
                to the mapping that lacks something.
    ``at_key``  the key itself is at fault, not its value.
    """

    path: DataPath
    message: str
    expected: str = ""
    nearest: str = ""
    at_key: bool = False


def nearest(word: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The known word that was probably meant, or ""."""
    import difflib  # noqa: PLC0415  only for what is wrong

    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=cutoff)
    return close[0] if close else ""


def listing(words: Iterable[str], last: str = "or") -> str:
    """``a, b or c``."""
    items = list(words)
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"
