# SPDX-License-Identifier: Apache-2.0
"""Golden files: what each topology becomes, and what each wrong one is told.

After a change that is meant, ``python -m tests.golden.regenerate``, and review the difference.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import regenerate


@pytest.mark.parametrize("path", regenerate.topology_files(), ids=lambda p: p.stem)
def test_topology_becomes_what_it_was(path: Path) -> None:
    for golden, content in regenerate.golden_of(path).items():
        assert golden.read_text(encoding="utf-8") == content, golden.name


@pytest.mark.parametrize("path", regenerate.wrong_files(), ids=lambda p: p.stem)
def test_wrong_topology_is_told_exactly_why(path: Path) -> None:
    text = regenerate.error_of(path)
    assert text == path.with_suffix(".txt").read_text(encoding="utf-8")
    assert "Traceback" not in text
    assert text != "no error\n"


def test_field_reference_is_in_step_with_the_models() -> None:
    assert regenerate.REFERENCE.read_text(encoding="utf-8") == regenerate.reference()


def test_no_golden_file_is_left_over() -> None:
    kept = {path for kind in regenerate.KINDS for path in regenerate.GOLDEN.rglob(f"*.{kind}")}
    assert kept == set(regenerate.all_golden()) - {regenerate.REFERENCE}
