# SPDX-License-Identifier: Apache-2.0
"""Every break is in the table, every row has one, and docs/breaks.md is in step."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.instruments.mutations import DESCRIPTIONS
from tests.breaks import table

ROOT = Path(__file__).parents[2]
SUITES = sorted({suite for suite, _ in table.failing()})


@pytest.mark.parametrize("suite", SUITES)
def test_every_row_has_a_break_that_it_fails_of(suite: str) -> None:
    failed = {row for (of, _), ids in table.failing().items() if of == suite for row in ids}
    rows = table.rows_of(suite)
    assert rows - failed - set(table.WITHOUT_BREAK) == set(), "write a break for these"
    assert failed <= rows


def test_every_break_is_in_the_table() -> None:
    known = {mutation for _, mutation in table.failing()}
    assert {str(each) for each in DESCRIPTIONS if each not in known} == set()


def test_the_document_is_in_step() -> None:
    text = (ROOT / "docs" / "breaks.md").read_text()
    assert text == table.document(table.failing()), "python -m tests.breaks.table > docs/breaks.md"
