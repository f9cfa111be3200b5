# SPDX-License-Identifier: Apache-2.0
"""Optional timing: what a path of some bandwidth and latency takes, so that better can be measured.

The model is a pipe: transfers queue behind each other for their bytes, and each arrives one latency
later. It slows down, it never speeds up: without a bandwidth a transfer takes what memcpy takes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from testbed.errors import InputError

MAX_LATENCY_S = 1.0


@dataclass(frozen=True)
class Timing:
    """``bytes_per_s`` 0 means that only the latency counts."""

    bytes_per_s: float = 0.0
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes_per_s < 0 or not 0.0 <= self.latency_s <= MAX_LATENCY_S:
            raise InputError(
                f"timing: bytes_per_s is not negative, latency_s at most {MAX_LATENCY_S:g}"
            )


NO_TIMING = Timing()


class Pipe:
    """One path with a timing that can change."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self._free_at_s = 0.0

    def wait_s(self, size_bytes: int) -> float:
        """How long from now until ``size_bytes`` more have passed."""
        timing = self.timing
        if not (timing.bytes_per_s or timing.latency_s):
            return 0.0
        now = time.monotonic()
        taken_s = size_bytes / timing.bytes_per_s if timing.bytes_per_s else 0.0
        self._free_at_s = max(self._free_at_s, now) + taken_s
        return self._free_at_s + timing.latency_s - now
