# SPDX-License-Identifier: Apache-2.0
"""What a step saw, as values; conditions are judged from these alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from testbed.results.evidence import Evidence
from testbed.results.judging import FaultWindow, Moved


@dataclass(frozen=True)
class Seen:
    """One step's result.

    ``values``    by field, for references and `expect`.
    ``window``    the faults recorded meanwhile, for steps that do DMA.
    ``moved``     bytes by path meanwhile, as ``device`` counted; None if it keeps no count.
    ``place``     what a `checksum` read, and ``guest`` and ``host`` its digests there.
    ``lines``     the kernel's.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    window: FaultWindow | None = None
    moved: Moved | None = None
    device: str = ""
    size_bytes: int = 0
    place: str = ""
    guest: str = ""
    host: str | None = None
    lines: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
