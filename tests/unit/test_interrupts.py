# SPDX-License-Identifier: Apache-2.0
"""A command that is asked to end ends, wherever its interpreter is."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The signal comes while a callback runs whose exceptions Python only prints.
PROGRAM = """
import os, signal, time, weakref
from testbed import interrupts

class Thing:
    pass

interrupts.heed()
def callback(_):
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000):
        pass
thing = Thing()
watch = weakref.ref(thing, callback)
del thing
try:
    time.sleep(20)
except KeyboardInterrupt:
    print("unwound")
"""


def run(program: str, *, ignored: str = "") -> tuple[int, str, str]:
    """Its exit code, and what it said; ``ignored``: the signal that its caller has it ignore."""
    words = [sys.executable, "-c", program]
    if ignored:
        words = ["sh", "-c", f'trap "" {ignored.removeprefix("SIG")}; exec "$@"', "sh", *words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=15, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_python_swallows_is_heeded(name: str) -> None:
    # Whoever runs the tests in the background has them ignore SIGINT.
    default = f"import signal; signal.signal(signal.{name}, signal.SIG_DFL)"
    assert run(default + PROGRAM.format(name=name)) == (0, "unwound\n", "")


def test_what_else_a_callback_raises_is_printed() -> None:
    program = PROGRAM.format(name="SIGINT").replace("os.kill(os.getpid(), signal.SIGINT)", "1 / 0")
    code, _, said = run(program.replace("sleep(20)", "sleep(0)"))
    assert code == 0
    assert "ZeroDivisionError" in said


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_what_the_caller_has_us_ignore_stays_ignored(name: str) -> None:
    program = PROGRAM.format(name=name).replace("sleep(20)", "sleep(0.1)")
    assert run(program, ignored=name) == (0, "", "")
