# SPDX-License-Identifier: Apache-2.0
"""Devices of a user's own, as files: one that works, and those that do every kind of wrong."""

from __future__ import annotations

from pathlib import Path

from testbed.topology.units import GIB

_HEAD = """\
from testbed.models.config import Bar, Identity
from testbed.models.device import Device
"""
_CARD = """
class Card(Device):
    identity = Identity(0x1234, 0xCA4D, 0x120000)
    bars = (Bar(0, 4096),)
"""

# name → what stands before the class, what stands in it
_CARDS = {
    "good": ("", "def __init__(self, name, depth=1):\n        super().__init__(name)"),
    "large": ("", f"bars = (Bar(0, 4096), Bar(2, {8 * GIB}, is_64bit=True, prefetchable=True))"),
    "low": ("", "bars = (Bar(0, 1 << 30),)"),
    "raises": ("", "def __init__(self, name):\n        raise ValueError('no such depth')"),
    "raises_at_import": ("1 / 0", "pass"),
    "syntax": ("def f(:", "pass"),
    "exits": ("import sys; sys.exit(3)", "pass"),
    "exits_at_once": ("import os; os._exit(3)", "pass"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "pass"),
    "allocates": ("kept = bytearray(3 << 30)", "pass"),
    "hangs": ("while True: pass", "pass"),
    "hangs_for_good": (
        """import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
while True: pass""",
        "pass",
    ),
    "raises_when_used": (
        "",
        """def read(self, bar, offset, size):
        if offset == 8: return {}[offset]
        return 0x5EED""",
    ),
    "works_once": (
        "from pathlib import Path; Path(__file__).with_name('trace').touch(exist_ok=False)",
        "pass",
    ),
    "talks": (
        "print('{}', flush=True)",
        "def __init__(self, name):\n        super().__init__(name); print(1)",
    ),
    "imports": ("import good", "bars = good.Card.bars"),
    "leaves_a_trace": (
        "from pathlib import Path; Path(__file__).with_name('trace').touch()",
        "pass",
    ),
}
FIRST_LINE = _HEAD.count("\n") + 1  # where what is before the class stands


def write_card(folder: Path, name: str) -> Path:
    """The file of one of them."""
    before, inside = _CARDS[name]
    path = folder / f"{name}.py"
    path.write_text(f"{_HEAD}{before}\n{_CARD}    {inside}\n")
    return path


def write_topology(folder: Path, *entries: str) -> Path:
    """A topology on whose root bus these entries stand."""
    path = folder / "rack.yaml"
    rows = "".join(f"      - {{{entry}}}\n" for entry in entries)
    path.write_text(f"rack: own\nnodes:\n  host0:\n    pcie:\n{rows}")
    return path
