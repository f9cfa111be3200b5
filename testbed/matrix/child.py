# SPDX-License-Identifier: Apache-2.0
"""One `testbed run` as a process of its own: it ends in time, when it is told to, and with us.

It gets a session of its own, so that Ctrl-C reaches it only through us, and the kernel kills it
when the thread that started it ends (``PR_SET_PDEATHSIG``); its racks' keepers then end theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from testbed.host.child import DIE_WITH_US

LOG = "harness.log"
OUTPUT = "stdout"
_POLL_S = 0.05
_GRACE_S = 20.0  # to end racks in; the keeper's own deadline is shorter
_TAIL_BYTES = 4000


@dataclass(frozen=True)
class ChildEnd:
    """How it ended: by itself, at its deadline, or because it was cancelled.

    ``status``     as of :class:`subprocess.Popen`: negative for a signal.
    ``tail``       the last that it said on standard error.
    """

    status: int
    why: Literal["ended", "deadline", "cancelled"]
    duration_s: float
    tail: str

    @property
    def last_words(self) -> str:
        """The last line that says something; a hint is not it."""
        lines = [line.strip() for line in self.tail.splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("hint:")]
        return (said or lines or [""])[-1].removeprefix("testbed: ")


def run(
    words: Sequence[str],
    folder: Path,
    *,
    deadline_s: float,
    cancelled: Callable[[], bool] = lambda: False,
) -> ChildEnd:
    """Run ``testbed run WORDS``; its standard output and error go to files in ``folder``.

    It does not write itself into the history: that is for whoever keeps its folder.

    :param cancelled: asked all the time; true ends it.
    :raises OSError: it could not be started.
    """
    began_s = time.monotonic()
    command = [*DIE_WITH_US, sys.executable, "-m", "testbed.cli", "run", "--no-history"]
    command += words
    # What the user set for the whole is told in words; a child must not be parallel again.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TESTBED_RUN_")}
    why: Literal["ended", "deadline", "cancelled"] = "ended"
    with (folder / OUTPUT).open("wb") as output, (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            start_new_session=True,
            env=environment,
        )
        try:
            while process.poll() is None:
                if cancelled():
                    why = "cancelled"
                    break
                if time.monotonic() - began_s > deadline_s:
                    why = "deadline"
                    break
                time.sleep(_POLL_S)
        finally:
            end(process)
    status = process.returncode if process.returncode is not None else -9
    return ChildEnd(status, why, time.monotonic() - began_s, tail_of(folder / LOG))


def end(process: subprocess.Popen[bytes]) -> None:
    """Let it end its racks, then make it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()  # its keepers see that, and end everything
        process.wait(_GRACE_S)


def tail_of(path: Path) -> str:
    """The end of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
