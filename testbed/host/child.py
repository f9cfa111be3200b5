# SPDX-License-Identifier: Apache-2.0
"""Programs that this process starts: they end in time, and they end with it."""

from __future__ import annotations

import contextlib
import subprocess

# A child that outlived a killed set-up would hold apt's lock or write into the next one's folder
# (setpriv(1), of util-linux, which every Debian has).
DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
_GRACE_S = 5.0


def end(process: subprocess.Popen[bytes]) -> None:
    """Make it end, kindly first, and reap it.

    A process that the kernel does not let go even then is left to it: waiting would hang.
    """
    for signal in (process.terminate, process.kill):
        if process.poll() is None:
            signal()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
