# SPDX-License-Identifier: Apache-2.0
"""Faults on purpose: rules that say which accesses of a device go wrong, and how.

A rule counts the accesses it matches, so "the third write over the link" and "one in a hundred
reads, seed 7" are both the same every time. Rules come and go while the rack runs.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from testbed.errors import InputError
from testbed.models.witness import Path

EVERY_ADDRESS = 1 << 64
MAX_RULES = 64
MAX_HISTORY = 256
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
    ``least_bytes``  only accesses of at least that size: data, and no commands or fences.
    ``skip``       let that many matching accesses pass first ("the nth" is ``skip = n - 1``).
    ``every``      of what follows, only each so many-th.
    ``count``      then strike that many times; 0 for ever.
    ``probability``/``seed``  of those, strike only some, by a generator of the rule's own.
    ``by``         who wants it, for the record: ``topology``, ``command``, ``test``, ``suite``.
    """

    name: str
    action: Action
    write: bool | None = None
    path: Path | None = None
    start: int = 0
    end: int = EVERY_ADDRESS
    least_bytes: int = 0
    skip: int = 0
    every: int = 1
    count: int = 1
    probability: float = 1.0
    seed: int = 0
    delay_s: float = 0.0
    by: str = "command"

    def __post_init__(self) -> None:
        negative = min(self.skip, self.count, self.least_bytes, self.every - 1) < 0
        if not self.name or self.start >= self.end or negative:
            raise InputError(f"rule '{self.name}': empty name or range, or a negative number")
        if not 0.0 < self.probability <= 1.0 or not 0.0 <= self.delay_s <= MAX_DELAY_S:
            raise InputError(
                f"rule '{self.name}': probability is above 0 and at most 1, delay_s at most "
                f"{MAX_DELAY_S:g}"
            )
        if self.action is Action.DELAY and not self.delay_s:
            raise InputError(f"rule '{self.name}': a delay needs delay_s")

    def matches(self, path: Path, address: int, size_bytes: int, *, write: bool) -> bool:
        """Whether an access is of the kind that the rule counts."""
        return (
            self.write in (None, write)
            and self.path in (None, path)
            and address < self.end
            and address + size_bytes > self.start
            and size_bytes >= self.least_bytes
        )

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
    "least_bytes": int,
    "skip": int,
    "every": int,
    "count": int,
    "probability": (int, float),
    "seed": int,
    "delay_s": (int, float),
    "by": str,
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
        if not rule.matches(path, address, size_bytes, write=write):
            return False
        self.seen += 1
        due = self.seen > rule.skip and (self.seen - rule.skip) % rule.every == 0
        if not due or (rule.count and self.struck >= rule.count):
            return False
        if rule.probability < 1.0 and self.random.random() >= rule.probability:
            return False
        self.struck += 1
        return True


class Rules:
    """The rules of one device, asked in the order in which they were added."""

    def __init__(self) -> None:
        self._armed: dict[str, _Armed] = {}
        self._history: deque[_Armed] = deque(maxlen=MAX_HISTORY)

    def __bool__(self) -> bool:
        return bool(self._armed)

    def add(self, rule: Rule) -> None:
        """Arm a rule, in place of one of the same name. InputError when there are too many."""
        if rule.name not in self._armed and len(self._armed) >= MAX_RULES:
            raise InputError(f"more than {MAX_RULES} rules")
        self._armed[rule.name] = _Armed(rule)
        self._history.append(self._armed[rule.name])

    def remove(self, name: str) -> None:
        """Disarm a rule; InputError if there is none of that name."""
        if self._armed.pop(name, None) is None:
            raise InputError(f"no rule '{name}'")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rules that are armed."""
        return tuple(self._armed)

    def clear(self) -> None:
        """Disarm all."""
        self._armed.clear()

    def report(self) -> list[dict[str, int | str]]:
        """Name, accesses seen and struck of each rule; for JSON."""
        return [
            {"name": name, "seen": armed.seen, "struck": armed.struck}
            for name, armed in self._armed.items()
        ]

    def history(self) -> list[dict[str, int | str | bool]]:
        """Every rule there ever was (the latest :data:`MAX_HISTORY`), disarmed ones too."""
        return [
            {
                "name": each.rule.name,
                "by": each.rule.by,
                "armed": self._armed.get(each.rule.name) is each,
                "seen": each.seen,
                "struck": each.struck,
            }
            for each in self._history
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
        armed = self._armed.get(rule.name) or _Armed(rule)  # it may have been disarmed meanwhile
        chosen = armed.random.randrange(len(changed) * 8)
        changed[chosen // 8] ^= 1 << chosen % 8
        return bytes(changed)
