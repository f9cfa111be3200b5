# SPDX-License-Identifier: Apache-2.0
"""What the tables of breaks have in common: a break, a test of a suite that must FAIL of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from testbed.instruments.mutations import Mutation


def requirements_of(test: Callable[..., None]) -> set[str]:
    """The rows that a test of a suite is marked with."""
    marks: list[pytest.Mark] = getattr(test, "pytestmark", [])
    return {each for mark in marks if mark.name == "requirement" for each in mark.args}


def guard_id(broken: Mutation, test: Callable[..., None], more: Mapping[str, Any]) -> str:
    """``keep-open-no_mapping_after_a_revoke``."""
    words = [test.__name__.removeprefix("test_"), *map(str, more.values())]
    return f"{broken}-{'-'.join(words)}"
