# SPDX-License-Identifier: Apache-2.0
"""How the vIOMMU translated a device's accesses: QEMU's own word, from its trace.

``vtd_dmar_translate`` and ``amdvi_translation_result`` (hw/i386/trace-events) and
``virtio_iommu_translate_out`` (hw/virtio/trace-events) are written for each translated access.
They say which bus address led to which address of the machine: the proof that an IOVA was used, or
that the identity was. Only Intel's tells the size of the page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from testbed.errors import QmpError
from testbed.instruments.interface import RackNode
from testbed.machine.command import QEMU_LOG
from testbed.results.evidence import Note
from testbed.results.judging import PAGE_BYTES, Judgement

TRACE_EVENTS = ("vtd_dmar_translate", "amdvi_translation_result", "virtio_iommu_translate_out")
_LINE = re.compile(
    r"vtd_dmar_translate dev ([0-9a-f]{2}):([0-9a-f]{2})\.([0-9a-f]{2})"
    r" iova 0x([0-9a-f]+) -> gpa 0x([0-9a-f]+) mask 0x([0-9a-f]+)"
)
_AMD_LINE = re.compile(
    r"amdvi_translation_result devid: ([0-9a-f]{2}):([0-9a-f]{2})\.([0-9a-f])"
    r" gpa 0x([0-9a-f]+) hpa 0x([0-9a-f]+)"
)
_VIRTIO_LINE = re.compile(
    r"virtio_iommu_translate_out 0x([0-9a-f]+) -> 0x([0-9a-f]+) for sid=(\d+)"
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

    def judge(self, requester: str, physical: int, size_bytes: int, address: int) -> Judgement:
        """Was every access of ``requester`` to a place of the machine made by ``address``?"""
        if not self.watched:
            return Judgement(True, "this machine's IOMMU shows no translations")
        seen = self.into(requester, physical, size_bytes)
        evidence = tuple(Note(f"{t.requester} {t.iova:#x} → {t.physical:#x}") for t in seen[:2])
        if not seen:
            return Judgement(False, f"no access to {physical:#x} was translated", evidence)
        if any(not t.iova <= address < t.iova + t.size_bytes for t in seen):
            return Judgement(False, f"{physical:#x} was reached by another address", evidence)
        return Judgement(True, f"{physical:#x} was reached by {address:#x}", evidence)

    def _switch(self, *, on: bool) -> bool:
        try:
            for event in TRACE_EVENTS:
                self._node.qmp("trace-event-set-state", name=event, enable=on)
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
    for bus, slot, function, *words in set(_AMD_LINE.findall(text)):
        found.add(_page(f"0000:{bus}:{slot}.{function}", *words))
    for iova_text, physical_text, source_text in set(_VIRTIO_LINE.findall(text)):
        source = int(source_text)
        requester = f"0000:{source >> 8:02x}:{source >> 3 & 0x1F:02x}.{source & 7:x}"
        found.add(_page(requester, iova_text, physical_text))
    return frozenset(found)


def _page(requester: str, iova: str, physical: str) -> Translation:
    return Translation(requester, int(iova, 16) & -PAGE_BYTES, int(physical, 16) & -PAGE_BYTES)
