# SPDX-License-Identifier: Apache-2.0
"""A real machine as the importers find it: a tree of parts, whatever the file's format was.

Position decides what a bridge is, as in the kernel: on the root bus a root port, below one the
upstream port of a switch, and below that its downstream ports.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

# More bridges in a row than any machine has; and what YAML's own limit on nesting leaves room for.
MOST_BRIDGES_IN_A_ROW = 32

_ADDRESS = re.compile(
    r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.IGNORECASE | re.ASCII
)


class Kind(StrEnum):
    """What a part is."""

    GPU = "gpu"
    NIC = "nic"
    NVME = "nvme"
    OTHER = "other"
    ROOT_PORT = "root_port"
    SWITCH = "switch"
    PORT = "port"  # a switch's downstream port


DEVICES = (Kind.GPU, Kind.NIC, Kind.NVME, Kind.OTHER)


class Acs(StrEnum):
    """What is known of a port's Access Control Services; of several ports, the first counts."""

    UNKNOWN = "unknown"
    REDIRECT = "redirect"  # peer requests go up to the root complex
    OFF = "off"  # they are there, and leave peers alone
    NONE = "none"  # there are none


@dataclass(frozen=True, order=True)
class Address:
    """A PCI address; domains beyond 16 bits exist (Intel VMD counts from 10000)."""

    domain: int
    bus: int
    slot: int
    number: int

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.slot:02x}.{self.number:x}"


def parse_address(text: str) -> Address | None:
    """``3b:00.0`` or ``0000:3b:00.0``; None for anything else."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return None
    domain, bus, slot, number = match.groups()
    return Address(int(domain or "0", 16), int(bus, 16), int(slot, 16), int(number))


@dataclass(frozen=True)
class Part:
    """A device, or a bridge with what is below it.

    ``origin``        how the file names it: an address such as ``0000:3b:00.0``, or ``GPU0``.
    ``rank``          where it stands among those of its kind when they are numbered.
    ``what``          the file's words for it.
    ``memory_bytes``  the size of a GPU's memory or its largest BAR; 0 if not known.
    ``functions``     how many PCI functions it stands for.
    """

    kind: Kind
    origin: str
    rank: tuple[int | str, ...] = ()
    what: str = ""
    acs: Acs = Acs.UNKNOWN
    memory_bytes: int = 0
    functions: int = 1
    below: tuple[Part, ...] = ()

    def devices(self) -> Iterator[Part]:
        """This part, if it is a device, and all devices below it."""
        if self.kind in DEVICES:
            yield self
        for part in self.below:
            yield from part.devices()


@dataclass(frozen=True)
class Wire:
    """A private link between two GPUs, each by its ``origin``; ``width`` 0 if not known."""

    kind: str
    ends: tuple[str, str]
    width: int = 0


@dataclass
class Notes:
    """What the user must be told, one sentence each.

    ``unknown``  could not be read from the file; a setting where there is one.
    ``changed``  is in the file, and a rack shows it otherwise.
    ``folded``   is in the file and not in the rack.
    """

    unknown: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Machine:
    """All of it: what stands on the root buses, private links, and the rest as it is known.

    ``peers_through_host``  whether Linux lets peers reach one another through the machine's host
                            bridges; None if the file does not tell.
    """

    source: str
    roots: tuple[Part, ...]
    notes: Notes
    wires: tuple[Wire, ...] = ()
    peers_through_host: bool | None = None

    def devices(self) -> Iterator[Part]:
        """Every device, in the file's order."""
        for root in self.roots:
            yield from root.devices()


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 switch``, ``2 switches``."""
    ending = "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{number} {noun if number == 1 else plural or noun + ending}"
