# SPDX-License-Identifier: Apache-2.0
"""Faults on purpose: rules that say which accesses of a device go wrong, and how.

A rule counts the accesses it matches, so "the third write over the link" and "one in a hundred
reads, seed 7" are both the same every time. Rules come and go while the rack runs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from testbed.errors import InputError
from testbed.models.witness import Path

EVERY_ADDRESS = 1 << 64
MAX_RULES = 64
MAX_DELAY_S = 60.0


class Action(StrEnum):
    """What happens to an access."""

    DROP = "drop"  # a write is lost without a word; a read never completes (time-out)
    DELAY = "delay"  # it happens `delay_s` later
    CORRUPT = "corrupt"  # one bit of its data, chosen by the seed, is flipped
    POISON = "poison"  # the data is marked bad: the access ends in an error
    REORDER = "reorder"  # a write happens after the device's next write


@dataclass(frozen=True)
class Rule:
    """One fault.

    ``write``      True for writes, False for reads, None for both.
    ``path``       only accesses that take this path; None for any.
    ``start``/``end``  only accesses that touch these addresses, end exclusive.
    ``skip``       let that many matching accesses pass first ("the nth" is ``skip = n - 1``).
    ``count``      then strike that many times; 0 for ever.
    ``probability``/``seed``  of those, strike only some, by a generator of the rule's own.
    """

    name: str
    action: Action
    write: bool | None = None
    path: Path | None = None
    start: int = 0
    end: int = EVERY_ADDRESS
    skip: int = 0
    count: int = 1
    probability: float = 1.0
    seed: int = 0
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.name or self.start >= self.end or self.skip < 0 or self.count < 0:
            raise InputError(f"rule '{self.name}': empty name or range, or a negative number")
        if not 0.0 < self.probability <= 1.0 or not 0.0 <= self.delay_s <= MAX_DELAY_S:
            raise InputError(
                f"rule '{self.name}': probability is above 0 and at most 1, delay_s at most "
                f"{MAX_DELAY_S:g}"
            )
        if self.action is Action.DELAY and not self.delay_s:
            raise InputError(f"rule '{self.name}': a delay needs delay_s")

    @classmethod
    def parse(cls, data: object) -> Rule:
        """A rule from its JSON form (the fields above). InputError names what is wrong."""
        if not isinstance(data, Mapping):
            raise InputError("a rule is an object")
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        if unknown:
            raise InputError(f"a rule has no '{unknown[0]}'")
        values = dict(data)
        try:
            values["action"] = Action(values.get("action", ""))
            if values.get("path") is not None:
                values["path"] = Path(values["path"])
        except ValueError as error:
            raise InputError(f"rule: {error}") from error
        for field, kinds in _KINDS.items():
            if field in values and (
                not isinstance(values[field], kinds) or isinstance(values[field], bool)
            ):
                raise InputError(f"rule: '{field}' is of the wrong kind")
        if not isinstance(values.get("write"), bool | None):
            raise InputError("rule: 'write' is true, false or absent")
        if "name" not in values:
            raise InputError("a rule needs a name")
        return cls(**values)


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "name": str,
    "start": int,
    "end": int,
    "skip": int,
    "count": int,
    "probability": (int, float),
    "seed": int,
    "delay_s": (int, float),
}


class _Armed:
    """A rule with its counts."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.random = random.Random(rule.seed)  # noqa: S311 - has to be the same every time
        self.seen = 0
        self.struck = 0

    def strikes(self, path: Path, address: int, size_bytes: int, *, write: bool) -> bool:
        rule = self.rule
        if rule.write is not None and rule.write != write:
            return False
        if rule.path is not None and rule.path != path:
            return False
        if address >= rule.end or address + size_bytes <= rule.start:
            return False
        self.seen += 1
        if self.seen <= rule.skip or (rule.count and self.struck >= rule.count):
            return False
        if rule.probability < 1.0 and self.random.random() >= rule.probability:
            return False
        self.struck += 1
        return True


class Rules:
    """The rules of one device, asked in the order in which they were added."""

    def __init__(self) -> None:
        self._armed: dict[str, _Armed] = {}

    def __bool__(self) -> bool:
        return bool(self._armed)

    def add(self, rule: Rule) -> None:
        """Arm a rule, in place of one of the same name. InputError when there are too many."""
        if rule.name not in self._armed and len(self._armed) >= MAX_RULES:
            raise InputError(f"more than {MAX_RULES} rules")
        self._armed[rule.name] = _Armed(rule)

    def remove(self, name: str) -> None:
        """Disarm a rule; InputError if there is none of that name."""
        if self._armed.pop(name, None) is None:
            raise InputError(f"no rule '{name}'")

    def clear(self) -> None:
        """Disarm all."""
        self._armed.clear()

    def report(self) -> list[dict[str, int | str]]:
        """Name, accesses seen and struck of each rule; for JSON."""
        return [
            {"name": name, "seen": armed.seen, "struck": armed.struck}
            for name, armed in self._armed.items()
        ]

    def judge(self, path: Path, address: int, size_bytes: int, *, write: bool) -> Rule | None:
        """The rule that strikes this access, if one does."""
        for armed in self._armed.values():
            if armed.strikes(path, address, size_bytes, write=write):
                return armed.rule
        return None

    def corrupt(self, rule: Rule, data: bytes) -> bytes:
        """``data`` with one bit flipped."""
        changed = bytearray(data)
        chosen = self._armed[rule.name].random.randrange(len(changed) * 8)
        changed[chosen // 8] ^= 1 << chosen % 8
        return bytes(changed)
