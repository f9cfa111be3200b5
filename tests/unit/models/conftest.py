# SPDX-License-Identifier: Apache-2.0
"""What tests of the models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.models.gpu_bench import Bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A GPU model, plugged in and enabled."""
    with Bench() as bench:
        yield bench
