# SPDX-License-Identifier: Apache-2.0
"""Fault rules in words, the same in a topology, in a test and on the command line.

::

    drop write nth=3                    the third write is lost
    corrupt min=4K every=100            of the accesses of 4 KiB or more, a bit of each 100th flips
    delay read path=link for=2ms        every read over a link takes 2 ms more
    poison range=0x10000+64K probability=0.1 seed=7

The words are the rule's name too. What they become: :class:`testbed.models.inject.Rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from testbed.errors import Diagnostic, InputError
from testbed.models.inject import MAX_DELAY_S, Action, Rule
from testbed.models.witness import Path
from testbed.topology.problem import listing, nearest
from testbed.topology.units import (
    DURATION_EXPECTED,
    NS_PER_S,
    SIZE_EXPECTED,
    SizeError,
    parse_duration,
    parse_size,
)

ACTIONS = tuple(action.value for action in Action)
DIRECTIONS = {"read": False, "write": True}
RULE_EXPECTED = (
    f"{listing(ACTIONS)}; then perhaps read or write, and any of nth=3, every=10, after=5, "
    "times=2, min=4K, range=0x1000+64K, path=link, probability=0.1, seed=7, for=2ms (a delay's)"
)


class RuleError(ValueError):
    """Words that are no rule; ``expected`` and ``nearest`` as in a diagnostic."""

    def __init__(self, message: str, *, expected: str = "", nearest: str = "") -> None:
        super().__init__(message)
        self.expected = expected
        self.nearest = nearest


def parse_rule(text: str, *, by: str) -> Rule:
    """The rule that words stand for; ``by`` says who wants it. RuleError says what is wrong."""
    words = text.split()
    action = words[0] if words else ""
    if action not in ACTIONS:
        raise RuleError(
            f"'{action}' is no fault", expected=listing(ACTIONS), nearest=nearest(action, ACTIONS)
        )
    fields: dict[str, Any] = {"count": 0}
    seen: set[str] = set()
    for word in words[1:]:
        key, equals, value = word.partition("=")
        kind = "direction" if key in DIRECTIONS else key
        if kind in seen:
            raise RuleError(f"'{word}': {kind} is there twice")
        seen.add(kind)
        if not equals and key in DIRECTIONS:
            fields["write"] = DIRECTIONS[key]
        elif equals and key in _READERS:
            fields |= _READERS[key](word, value)
        else:
            known = [*DIRECTIONS, *(f"{name}=" for name in _READERS)]
            raise RuleError(
                f"'{word}' says nothing about a fault",
                expected=listing(known),
                nearest=nearest(key + equals, known),
            )
    if "nth" in seen and seen & {"every", "after", "times"}:
        raise RuleError("nth= strikes once; it goes with neither every=, after= nor times=")
    if "for" in seen and action != Action.DELAY:
        raise RuleError(f"'{action}' has no for=: only a delay takes its time")
    if "for" not in seen and action == Action.DELAY:
        raise RuleError("a delay says how long it is", expected="for=2ms")
    try:
        return Rule(" ".join(words), Action(action), **fields, by=by)
    except InputError as error:
        raise RuleError(error.message.partition(": ")[2]) from error


def rule_data(rule: Rule) -> dict[str, Any]:
    """The rule as the device's process reads it (JSON)."""
    return asdict(rule)


def split_rules(words: Iterable[str]) -> list[str]:
    """``drop write delay for=1ms`` → two rules: each begins with its action."""
    rules: list[list[str]] = []
    for word in " ".join(words).split():
        if not rules or word in ACTIONS:
            rules.append([])
        rules[-1].append(word)
    return [" ".join(rule) for rule in rules]


def name_of(text: str) -> str:
    """The name of the rule that these words stand for."""
    return " ".join(text.split())


def _whole(field: str, least: int) -> Callable[[str, str], dict[str, Any]]:
    def read(word: str, value: str) -> dict[str, Any]:
        if not value.isdecimal() or int(value) < least or len(value) > 18:
            raise RuleError(f"'{word}'", expected=f"a whole number, at least {least}")
        return {field: int(value)}

    return read


def _nth(word: str, value: str) -> dict[str, Any]:
    number = _whole("nth", 1)(word, value)["nth"]
    return {"skip": number - 1, "count": 1}


def _least(word: str, value: str) -> dict[str, Any]:
    return {"least_bytes": _size(word, value)}


def _range(word: str, value: str) -> dict[str, Any]:
    start, plus, size = value.partition("+")
    first, dots, end = value.partition("..")
    if plus:
        begin = _number(word, start)
        limit = begin + _size(word, size)
    elif dots:
        begin, limit = _number(word, first), _number(word, end)
    else:
        raise RuleError(f"'{word}'", expected=_RANGE_EXPECTED)
    if begin >= limit:
        raise RuleError(f"'{word}' is an empty range", expected=_RANGE_EXPECTED)
    return {"start": begin, "end": limit}


def _path(word: str, value: str) -> dict[str, Any]:
    paths = [path.value for path in Path]
    if value not in paths:
        raise RuleError(f"'{word}'", expected=listing(paths), nearest=nearest(value, paths))
    return {"path": Path(value)}


def _chance(word: str, value: str) -> dict[str, Any]:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 1.0:
        raise RuleError(f"'{word}'", expected="a number above 0 and at most 1")
    return {"probability": number}


def _delay(word: str, value: str) -> dict[str, Any]:
    try:
        delay_s = parse_duration(value) / NS_PER_S
    except SizeError as error:
        near = error.nearest and f"for={error.nearest}"
        raise RuleError(f"'{word}': {error}", expected=DURATION_EXPECTED, nearest=near) from None
    if delay_s > MAX_DELAY_S:
        raise RuleError(f"'{word}' is too long", expected=f"at most {MAX_DELAY_S:g}s")
    return {"delay_s": delay_s}


_RANGE_EXPECTED = "START+SIZE or START..END (the end excluded), such as 0x10000+64K"


def _number(word: str, value: str) -> int:
    try:
        return int(value, 0)
    except ValueError:
        raise RuleError(f"'{word}'", expected=_RANGE_EXPECTED) from None


def _size(word: str, value: str) -> int:
    try:
        return int(value, 16) if value.startswith("0x") else parse_size(value)
    except ValueError as error:
        near = getattr(error, "nearest", "")
        raise RuleError(f"'{word}'", expected=SIZE_EXPECTED, nearest=near) from None


_READERS: Mapping[str, Callable[[str, str], dict[str, Any]]] = {
    "nth": _nth,
    "every": _whole("every", 1),
    "after": _whole("skip", 0),
    "times": _whole("count", 1),
    "min": _least,
    "range": _range,
    "path": _path,
    "probability": _chance,
    "seed": _whole("seed", 0),
    "for": _delay,
}


def parse_rules(texts: Sequence[str], *, by: str) -> list[Rule]:
    """All of them; InputError with everything that is wrong."""
    rules: list[Rule] = []
    wrong: list[Diagnostic] = []
    for text in texts:
        try:
            rules.append(parse_rule(text, by=by))
        except RuleError as error:
            place = f"rule '{name_of(text)}'"
            wrong.append(Diagnostic(place, 0, 0, str(error), error.expected, error.nearest))
    if wrong:
        raise InputError(diagnostics=wrong)
    return rules
