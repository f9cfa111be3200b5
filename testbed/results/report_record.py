# SPDX-License-Identifier: Apache-2.0
"""What a run's record keeps of a bug report (:mod:`testbed.reports`); a part of its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConditionRecord:
    """A condition of an expectation (``as_reported``, ``when_fixed``), judged."""

    expectation: str
    name: str
    holds: bool
    reason: str


@dataclass(frozen=True)
class StepRecord:
    """A step that was done, and what it saw, field by field."""

    number: int
    words: str
    values: Mapping[str, Any]
    duration_s: float


@dataclass(frozen=True)
class ReportRecord:
    """One bug report.

    ``file``      as the user named it; its content is in the run folder as ``report.yaml``.
    ``word``      REPRODUCED, FIXED, DIFFERENT, SKIP, LOST or ERROR.
    ``expected``  the word that was wanted, or "" if it only had to be told.
    """

    file: str
    title: str
    link: str
    word: str
    reason: str
    expected: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)
    stand_ins: tuple[str, ...] = ()
    conditions: tuple[ConditionRecord, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    boot_s: float = 0.0
    duration_s: float = 0.0
