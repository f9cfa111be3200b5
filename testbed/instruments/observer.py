# SPDX-License-Identifier: Apache-2.0
"""How a test says what it saw: the ``observe`` fixture."""

from __future__ import annotations

from testbed.results.evidence import Evidence, Note
from testbed.results.judging import Judgement
from testbed.results.verdicts import Outcome


class Refuted(AssertionError):
    """A claim does not hold. The message is the one-line reason of the FAIL."""


class Observer:
    """Collects a test's evidence, and ends the test as soon as a claim does not hold."""

    def __init__(self) -> None:
        self._evidence: list[Evidence] = []
        self._conclusion = ""
        self.parts: tuple[Outcome, ...] = ()

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """All that was seen so far."""
        return tuple(self._evidence)

    @property
    def conclusion(self) -> str:
        """What a PASS has shown, in one line."""
        return self._conclusion

    def add(self, *evidence: Evidence) -> None:
        """Keep evidence for the record."""
        self._evidence += evidence

    def note(self, text: str) -> None:
        """Keep a sentence for the reader of the record."""
        self.add(Note(text))

    def require(self, judgement: Judgement) -> None:
        """Keep its evidence; the test FAILs here unless it holds.

        Raises:
            Refuted: it does not hold.
        """
        self.add(*judgement.evidence)
        self._conclusion = judgement.reason
        if not judgement.holds:
            raise Refuted(judgement.reason)

    def report(self, *parts: Outcome) -> None:
        """What a test that ran other tests says: their outcomes, in place of its own."""
        self.parts += parts

    def conclude(self, text: str) -> None:
        """What the test has shown if nothing more goes wrong."""
        self._conclusion = text
