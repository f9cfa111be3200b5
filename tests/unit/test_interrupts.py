# SPDX-License-Identifier: Apache-2.0
"""A command that is asked to end ends, wherever its interpreter is."""

from __future__ import annotations

import signal
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


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_python_swallows_is_heeded(name: str) -> None:
    assert signal.Signals[name]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=name)],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "unwound\n", "")


def test_what_else_a_callback_raises_is_printed() -> None:
    program = PROGRAM.format(name="SIGINT").replace("os.kill(os.getpid(), signal.SIGINT)", "1 / 0")
    done = subprocess.run(
        [sys.executable, "-c", program.replace("sleep(20)", "sleep(0)")],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_what_the_caller_has_us_ignore_stays_ignored(name: str) -> None:
    program = PROGRAM.format(name=name).replace("sleep(20)", "sleep(0.1)")
    done = subprocess.run(
        ["sh", "-c", f'trap "" {name[3:]}; exec "$0" -c "$1"', sys.executable, program],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
