# SPDX-License-Identifier: Apache-2.0
"""How the vIOMMU translated a device's accesses: QEMU's own word, from its trace.

``vtd_dmar_translate`` (hw/i386/trace-events) is written for each access that is translated. It says
which bus address led to which address of the machine: the proof that an IOVA was used, or that the
identity was. Other IOMMUs than Intel's have no such trace here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from testbed.errors import QmpError
from testbed.machine.command import QEMU_LOG
from testbed.results.judging import PAGE_BYTES
from testbed.suites.interface import RackNode

TRACE_EVENT = "vtd_dmar_translate"
_LINE = re.compile(
    r"vtd_dmar_translate dev ([0-9a-f]{2}):([0-9a-f]{2})\.([0-9a-f]{2})"
    r" iova 0x([0-9a-f]+) -> gpa 0x([0-9a-f]+) mask 0x([0-9a-f]+)"
)


@dataclass(frozen=True, order=True)
class Translation:
    """One page, small or large: the bus addresses that a requester used, and where they led."""

    requester: str
    iova: int
    physical: int
    size_bytes: int = PAGE_BYTES

    @property
    def is_identity(self) -> bool:
        """The bus address is the machine's own."""
        return self.iova == self.physical


class TranslationWatch:
    """A span of time; ``seen`` is what was translated in it, once it is over.

    The trace is on only inside the block: a transfer of a few KiB writes a thousand lines.
    """

    def __init__(self, node: RackNode) -> None:
        self._node = node
        self._log = node.log_dir / QEMU_LOG
        self._start = 0
        self.watched = False
        self.seen: frozenset[Translation] = frozenset()

    def __enter__(self) -> Self:
        self.watched = self._switch(on=True)
        self._start = self._log.stat().st_size
        return self

    def __exit__(self, *_: object) -> None:
        if self.watched:
            self._switch(on=False)
            with self._log.open("rb") as log:
                log.seek(self._start)
                self.seen = parse_translations(log.read().decode(errors="replace"))

    def into(self, requester: str, physical: int, size_bytes: int) -> list[Translation]:
        """Those of one requester that led into a range, in order."""
        return sorted(
            each
            for each in self.seen
            if each.requester == requester
            and each.physical < physical + size_bytes
            and physical < each.physical + each.size_bytes
        )

    def _switch(self, *, on: bool) -> bool:
        try:
            self._node.qmp("trace-event-set-state", name=TRACE_EVENT, enable=on)
        except QmpError:
            return False
        return True


def parse_translations(text: str) -> frozenset[Translation]:
    """The translations in QEMU's trace, each page once."""
    found = set()
    for bus, slot, function, *words in set(_LINE.findall(text)):
        iova, physical, mask = (int(word, 16) for word in words)
        requester = f"0000:{bus}:{slot}.{int(function, 16):x}"
        found.add(Translation(requester, iova & ~mask, physical & ~mask, mask + 1))
    return frozenset(found)
