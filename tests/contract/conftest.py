# SPDX-License-Identifier: Apache-2.0
"""Devices in Python and their machine's side, each fresh for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.models.testing import FakeQemu
from tests.contract.model_process import Process, serving
from tests.unit.models.model_devices import Card


@pytest.fixture
def qemu() -> Iterator[FakeQemu]:
    """A machine's side of a card in this process."""
    with FakeQemu(Card()) as qemu:
        yield qemu


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    """A model process with two GPUs and a NIC."""
    with serving(tmp_path) as process:
        yield process
