# SPDX-License-Identifier: Apache-2.0
"""What the tests of the machine layer share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed.machine.command import MemoryFd, NodeCommand
from testbed.machine.processes import HelperCommand

ROOT = Path(__file__).resolve().parents[2]
_FAKE = (sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_qemu.py")))


def fake_qemu(
    node: str = "host0", *, memory: tuple[MemoryFd, ...] = (), **options: Any
) -> NodeCommand:
    """A node whose QEMU is fake_qemu.py, with these options."""
    return NodeCommand(node, (*_FAKE, json.dumps(options)), {}, memory)


def fake_helper(
    name: str, node: str = "host0", *, ready_timeout_s: float = 20.0, **options: Any
) -> HelperCommand:
    """A helper that is ready when ``NAME.sock`` exists; fake_qemu.py makes it with `touch`."""
    return HelperCommand(
        name,
        node,
        (*_FAKE, json.dumps(options)),
        ready_file=f"{name}.sock",
        ready_timeout_s=ready_timeout_s,
    )


def eventually(true: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Whether it becomes true in time."""
    deadline_s = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process of the testbed's, in a session of its own; warnings are errors in it."""
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/contract'}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
