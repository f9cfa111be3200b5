# SPDX-License-Identifier: Apache-2.0
"""What tests of the vfio-user server ask of their end of the connection."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from testbed.models.testing import CommandFailed, FakeQemu

PAGE = 4096


def open_descriptors() -> int:
    """How many this process has."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def refusal(qemu: FakeQemu, command: int, payload: bytes, fds: tuple[int, ...] = ()) -> int:
    """The error number with which the command is refused."""
    with pytest.raises(CommandFailed) as failed:
        qemu.call(command, payload, fds)
    return failed.value.number
