# SPDX-License-Identifier: Apache-2.0
"""What a machine said on its serial console, read from its log while it grows."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

_INIT = "testbed: "  # begins every line of the guest's init
READY_MARKER = f"{_INIT}ready"  # the guest's init prints it when its SSH server listens

TAIL_BYTES = 16 << 10
MAX_LINES = 2000
MAX_LINE_CHARACTERS = 2000
TRACE_LINES = 120
CHUNK_BYTES = 1 << 18

# kernel/panic.c vpanic(): "Kernel panic - not syncing: %s"
_PANIC = re.compile(r"Kernel panic - not syncing: ?(.*)")
# arch/x86/kernel/dumpstack.c, arch/x86/mm/fault.c, lib/bug.c, kernel/watchdog.c, mm/kasan/report.c
_OOPS = re.compile(r"\b(?:BUG: |Oops: |kernel BUG at |general protection fault|stack segment: ).*")
_NOT_TEXT = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def plain_text(data: bytes) -> str:
    """A line for a person: no escape sequences, no control characters, no undecodable bytes."""
    return _NOT_TEXT.sub("", data.decode("utf-8", errors="ignore")).rstrip()


def read_tail(path: Path, max_bytes: int = TAIL_BYTES) -> str:
    """The last lines of a log, as text; "" if it is not there."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - max_bytes))
            data = log.read(max_bytes)
    except OSError:
        return ""
    return "\n".join(map(plain_text, data.splitlines()))


class Console:
    """Follows the console log of one start of a machine.

    :meth:`poll` reads what is new; then ``panic`` and ``oops`` hold the kernel's own words ("" if
    there are none) and ``ready`` tells whether the guest's init said :data:`READY_MARKER`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.panic = ""
        self.oops = ""
        self.ready = False
        self._settled = ("", "")  # panic and oops in complete lines
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._partial = b""
        self._position = 0

    def poll(self) -> None:
        """Take in what was written since the last time; a missing file is an empty one."""
        try:
            if self.path.stat().st_size == self._position:
                return  # asked fifty times a second while a machine boots
            with self.path.open("rb") as log:
                if self._position > self.path.stat().st_size:  # truncated: a new start
                    self._position, self._partial = 0, b""
                log.seek(self._position)
                while data := log.read(CHUNK_BYTES):
                    self._position += len(data)
                    self._take(data)
        except OSError:
            return

    def _take(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > MAX_LINE_CHARACTERS:
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            text = plain_text(line)[:MAX_LINE_CHARACTERS]
            self._lines.append(text)
            self._look(text)
            self._settled = (self.panic, self.oops)
        self._look(plain_text(self._partial))  # a machine's last words may lack the newline

    def _look(self, text: str) -> None:
        panic, oops = self._settled
        if not panic and (match := _PANIC.search(text)):
            panic = match[1].strip() or "no reason given"
        if not oops and (match := _OOPS.search(text)):
            oops = match[0].strip()
        self.panic, self.oops = panic, oops
        self.ready = self.ready or READY_MARKER in text

    @property
    def complaint(self) -> str:
        """What the guest's init (images/init) last said that it misses, or ""."""
        said = [line for line in self._lines if line.startswith(_INIT) and line != READY_MARKER]
        return said[-1].removeprefix(_INIT) if said else ""

    def trace(self) -> str:
        """From the kernel's first oops on, as text; the tail if there was none.

        Two traces follow one another where an oops is made a panic, longer than a tail: what the
        kernel ran into, and in which module, stands at the beginning.
        """
        kept = self.tail(MAX_LINES).splitlines()
        first = next((n for n, line in enumerate(kept) if _OOPS.search(line)), None)
        if first is None:
            return self.tail()
        return "\n".join(kept[first : first + TRACE_LINES])

    def tail(self, lines: int = 40) -> str:
        """The last lines so far, as text."""
        last = plain_text(self._partial)
        kept = [*self._lines, *([last] if last else [])]
        return "\n".join(kept[-lines:])
