# SPDX-License-Identifier: Apache-2.0
"""What each mutation breaks about dma-bufs: the exporter's mode or care, the importer's manners.

The words are the modules' (guest_agent/kmod/dmabuf_exporter, dmabuf_importer): what goes wrong does
so in the guest's kernel. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from testbed.instruments.mutations import Mutation
from testbed.results.judging import PAGE_BYTES

_RIGHT = "provider"  # the mode whose place a wrong one takes
_WRONG = ("null-page", "bus-address", "no-check")
_LENGTH_LIMIT = 1 << 32

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Break:
    """``modes`` instead of others; ``exporter``: its careless words; ``importer``: what is added to
    the manners of importers that can be told; ``without``: what is taken from them."""

    mutation: Mutation = Mutation.NONE
    modes: Mapping[str, str] = field(default_factory=dict)
    exporter: tuple[str, ...] = ()
    importer: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def manners(self, words: Sequence[str]) -> list[str]:
        """How an importer that was to behave so behaves."""
        added = self.importer if "dynamic" in words else ()
        return [word for word in (*words, *added) if word not in self.without]

    def ranges(self, wanted: Ranges) -> Ranges:
        """What is exported instead of these (offset, size) of the BAR."""
        *before, (offset, size) = wanted
        match self.mutation:
            case Mutation.FIRST_RANGE:
                return wanted[:1]
            case Mutation.WRONG_PAGE:
                return [(offset + PAGE_BYTES, size) for offset, size in wanted]
            case Mutation.SHORT_MAP if size > PAGE_BYTES:
                return [*before, (offset, size - PAGE_BYTES)]
            case Mutation.LENGTH_32_BITS:
                return [*before, (offset, size % _LENGTH_LIMIT)]
        return wanted


_BREAKS = {
    each.mutation: each
    for each in (
        Break(Mutation.NO_MISTAKE, modes=dict.fromkeys(_WRONG, _RIGHT)),
        Break(Mutation.NULL_PAGE, modes={_RIGHT: "null-page"}),
        Break(Mutation.BAR_ADDRESS, modes={_RIGHT: "bus-address"}),
        Break(Mutation.NO_CHECK, modes={_RIGHT: "no-check"}),
        Break(Mutation.GIVE_PAGES, modes={_RIGHT: "pages"}),
        Break(Mutation.KEEP_OPEN, exporter=("keep-open",)),
        Break(Mutation.NO_WAIT, exporter=("no-wait",)),
        Break(Mutation.IGNORE_PIN, exporter=("ignore-pin",)),
        Break(Mutation.NO_COPY, exporter=("no-copy",)),
        Break(Mutation.EARLY_FENCE, exporter=("early-fence",)),
        Break(Mutation.SKIP_UNMAP, importer=("stubborn",)),
        Break(Mutation.SKIP_FENCE, importer=("hasty",)),
        Break(Mutation.NO_FAULT, without=("ondemand",)),
    )
}


def break_of(mutation: Mutation) -> Break:
    """What it breaks here; nothing, if it is about other things."""
    return _BREAKS.get(mutation, Break(mutation))
