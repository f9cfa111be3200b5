# SPDX-License-Identifier: Apache-2.0
"""A program that a keeper's nursling has imported: says what it was given, and waits."""

from __future__ import annotations

import json
import os
import random
import sys
import time

IMPORTED_BY = os.getpid()


def main(arguments: list[str]) -> int:
    """Ready when ``arguments[0]`` exists; what it was given stands on standard output."""
    fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))  # noqa: PTH208
    with open("/proc/self/cmdline", "rb") as file:  # noqa: PTH123
        words = file.read().rstrip(b"\0").decode().split("\0")
    said = {
        "pid": IMPORTED_BY,
        "cwd": os.getcwd(),  # noqa: PTH109
        "fds": fds,
        "words": words,
        "random": random.random(),  # noqa: S311 - shall not be another's
    }
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    os.close(os.open(arguments[0], os.O_WRONLY | os.O_CREAT))
    time.sleep(100)
    return 0
