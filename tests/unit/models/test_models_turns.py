# SPDX-License-Identifier: Apache-2.0
"""A batch of copies leaves others their turn: links that go down, the host, other devices."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from testbed.models.access import CHUNK_BYTES, LocalSpace, Mover

MIB = 1 << 20


@pytest.mark.parametrize(("size", "copies"), [(4 * MIB, 20), (8, 1280), (CHUNK_BYTES * 2, 5)])
def test_others_have_their_turn_within_a_batch(size: int, copies: int) -> None:
    """Ten turns at least in 80 MiB, or what takes as long, however it is cut into commands."""
    memory = SimpleNamespace(size_bytes=4 * CHUNK_BYTES, view=bytearray(4 * CHUNK_BYTES), name="m")
    space = LocalSpace(cast(Any, memory))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def batch() -> None:
        task = asyncio.create_task(others())
        mover = Mover(MagicMock(), cast(Any, ()))
        for _ in range(copies):
            await mover.copy(space, 0, space, 2 * CHUNK_BYTES, size)
        task.cancel()

    asyncio.run(batch())
    assert turns >= 9
