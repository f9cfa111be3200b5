# SPDX-License-Identifier: Apache-2.0
"""What the tables of breaks have in common: a break, a test of a suite that must FAIL of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from testbed.instruments.mutations import Mutation


def requirements_of(test: Callable[..., None]) -> set[str]:
    """The rows that a test of a suite is marked with."""
    marks: list[pytest.Mark] = getattr(test, "pytestmark", [])
    return {each for mark in marks if mark.name == "requirement" for each in mark.args}


def parameters(
    guards: Iterable[tuple[Mutation, Callable[..., None], Mapping[str, Any]]],
) -> list[Any]:
    """For ``parametrize``: break, test and its arguments, with the rows that the test has."""
    return [
        pytest.param(
            broken,
            test,
            more,
            marks=pytest.mark.requirement(*sorted(requirements_of(test))),
            id=_id(broken, test, more),
        )
        for broken, test, more in guards
    ]


def _id(broken: Mutation, test: Callable[..., None], more: Mapping[str, Any]) -> str:
    """``keep-open-no_mapping_after_a_revoke``."""
    words = [test.__name__.removeprefix("test_"), *map(str, more.values())]
    return f"{broken}-{'-'.join(words)}"
