# SPDX-License-Identifier: Apache-2.0
"""Deliberate breaks: how to see a FAIL.

A suite that never failed shows little. Each mutation breaks one thing on the harness's side, in
the one place that suites map and judge through, so that real devices do the wrong thing on a real
machine. ``testbed run --break NAME`` (or ``--testbed-break`` in pytest) must then end in FAIL of
just the requirements that guard what was broken, and a run says in its summary and record which
mutation it ran with.
"""

from __future__ import annotations

from enum import StrEnum

from testbed.errors import Diagnostic, InputError


class Mutation(StrEnum):
    """What is broken on purpose; NONE breaks nothing."""

    NONE = ""
    SKIP_UNMAP = "skip-unmap"
    BAR_ADDRESS = "bar-address"
    READ_WRITE = "read-write"
    WRONG_PAGE = "wrong-page"
    SHORT_MAP = "short-map"
    SWAP_CHUNKS = "swap-chunks"
    MAP_HOLES = "map-holes"
    TRUST_STATUS = "trust-status"


DESCRIPTIONS = {
    Mutation.SKIP_UNMAP: "an unmap is not done",
    Mutation.BAR_ADDRESS: "a peer's BAR is not mapped; its bus address is handed out",
    Mutation.READ_WRITE: "a read-only mapping is made writable",
    Mutation.WRONG_PAGE: "a peer's BAR is mapped one page further than asked",
    Mutation.SHORT_MAP: "the last page of a peer's BAR's mapping is left out",
    Mutation.SWAP_CHUNKS: "two pages of a scatter list are exchanged",
    Mutation.MAP_HOLES: "addresses that must be unmapped are mapped",
    Mutation.TRUST_STATUS: "a device's completion status is taken for the arrival of bytes",
}


def parse_mutation(name: str) -> Mutation:
    """The mutation called ``name``; "" and "none" break nothing.

    Raises:
        InputError: there is none of that name.
    """
    try:
        return Mutation("" if name == "none" else name)
    except ValueError:
        known = ", ".join(DESCRIPTIONS)
        raise InputError(
            diagnostics=[Diagnostic("--break", 0, 0, f"unknown mutation '{name}'", known)]
        ) from None
