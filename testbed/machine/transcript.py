# SPDX-License-Identifier: Apache-2.0
"""The record of what was said on a control socket."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

MAX_TRANSCRIPT_BYTES = 16 << 20
MAX_ENTRY_CHARACTERS = 64 << 10


class Transcript:
    """qmp.log: one JSON line a message, bounded; a disk that is full ends it, not the run."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO | None = None
        self._left_bytes = MAX_TRANSCRIPT_BYTES
        with contextlib.suppress(OSError):
            self._file = path.open("a", encoding="utf-8")

    def write(self, direction: str, message: Mapping[str, object]) -> None:
        """Note a message that went ``>`` to QEMU or came ``<`` from it."""
        if self._file is None:
            return
        entry: dict[str, object] = {"time": round(time.time(), 6), "way": direction}
        text = json.dumps(message)
        if len(text) > MAX_ENTRY_CHARACTERS:
            entry |= {"cut": len(text), "text": text[:MAX_ENTRY_CHARACTERS]}
        else:
            entry["message"] = message
        line = json.dumps(entry) + "\n"
        self._left_bytes -= len(line)
        try:
            self._file.write(line if self._left_bytes > 0 else '{"cut": "the log is full"}\n')
            self._file.flush()
        except OSError:
            self._left_bytes = 0
        if self._left_bytes <= 0:
            self.close()

    def close(self) -> None:
        """Safe to call twice."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
