# SPDX-License-Identifier: Apache-2.0
"""The tree that ``lspci -t`` draws, with names (``-tv``) or without.

Format: pciutils 3.13 ``ls-tree.c``. A ``+`` or a backslash continues the bus whose first ``+``
stands in the same column further up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from testbed.topology.importers import kinds
from testbed.topology.importers.bridges import Function, PortType
from testbed.topology.importers.lspci_blocks import MOST_FUNCTIONS
from testbed.topology.importers.machine import Address
from testbed.topology.importers.source import Deadline, plain
from testbed.topology.source import Fault, Source

_LINE = re.compile(r"[ |>]*(?:-\[|-\+|[+\\]-)")
_LONGEST_LINE = 2048
_BUS = re.compile(r"\[(?:([0-9a-f]{4,8}):)?([0-9a-f]{2})(?:-[0-9a-f]{2})?\]", re.IGNORECASE)
_DEVICE = re.compile(r"([01][0-9a-f])\.([0-7])", re.IGNORECASE)
_IDS = re.compile(r"(?:\[|Device )([0-9a-f]{4}):([0-9a-f]{4})\b", re.IGNORECASE)
_ANY_BUS = re.compile(r"-\[[0-9a-f:]{2,11}(?:-[0-9a-f]{2})?\]", re.IGNORECASE)

# A bus in the tree: domain and number. None is where root buses branch off.
_Bus = tuple[int, int]


@dataclass
class Tree:
    """The functions in the tree, and the bus behind each bridge."""

    functions: dict[Address, Function] = field(default_factory=dict)
    secondary: dict[Address, int] = field(default_factory=dict)


def parse(source: Source, deadline: Deadline) -> Tree:
    """The first tree in the source; an empty one if there is none."""
    reader = _Reader(source)
    if "-[" not in source.text:
        return reader.tree
    offset = 0
    for number, line in enumerate(source.text.split("\n"), 1):
        if number % 4096 == 0:
            deadline.check()
        text = line[:_LONGEST_LINE].rstrip()
        if _LINE.match(text) and (reader.branches or _ANY_BUS.search(text)):
            reader.line(text, offset, number)
        else:
            reader.branches.clear()
        offset += len(line) + 1
    return reader.tree


class _Reader:
    def __init__(self, source: Source) -> None:
        self.tree = Tree()
        self.branches: dict[int, _Bus | None] = {}
        self._source = source

    def line(self, text: str, index: int, number: int) -> None:
        """One line of the tree: where it branches off, and the chain of bridges to its device."""
        start = len(text) - len(text.lstrip(" |>"))
        bus: _Bus | None = None
        if text[start] in "+\\":
            if start not in self.branches:
                self._fail(index + start, "a branch of the tree that starts nowhere above")
            bus = self.branches[start]
        for column in [c for c in self.branches if c > start]:
            del self.branches[column]
        position, bridge = start, None
        while position < len(text):
            while position < len(text) and text[position] in "-+\\":
                if text[position] == "+":
                    self.branches[position] = bus
                position += 1
            found = _BUS.match(text, position)
            if found:
                bus = self._bus(found, bus, bridge, index + position)
                position = found.end()
                continue
            device = _DEVICE.match(text, position)
            if device is None or bus is None:
                if text[position:].strip() and bridge is None:
                    self._fail(index + position, "no device and no bus in this line of the tree")
                return
            words = text[device.end() :]
            bridge = self._device(bus, device, words, index + position, number)
            position = device.end()
            if not words.startswith("-["):
                return

    def _bus(
        self, found: re.Match[str], above: _Bus | None, bridge: Address | None, index: int
    ) -> _Bus:
        domain_text, number_text = found.groups()
        number = int(number_text, 16)
        if bridge is None:
            return int(domain_text or "0", 16), number
        if bridge in self.tree.secondary:
            self._fail(index, f"{bridge} leads to two buses")
        self.tree.secondary[bridge] = number
        return (above or (0, 0))[0], number

    def _device(
        self, bus: _Bus, found: re.Match[str], words: str, index: int, line: int
    ) -> Address:
        address = Address(*bus, int(found[1], 16), int(found[2]))
        functions = self.tree.functions
        if address in functions:
            first = functions[address].line
            self._fail(index, f"{address} stands here twice; the first is in line {first}")
        if len(functions) >= MOST_FUNCTIONS:
            self._fail(index, f"more than {MOST_FUNCTIONS} PCI functions")
        is_bridge = words.startswith("-[")
        ids = _IDS.findall(words)
        vendor, number = (
            (int(digits, 16) for digits in ids[-1]) if ids else kinds.ids_of_name(words)
        )
        name = plain(words, 90)
        functions[address] = Function(
            address=address,
            line=line,
            kind=kinds.of_name(name, vendor, number),
            port=PortType.UNKNOWN if is_bridge else None,
            what=name if not is_bridge else "",
            vendor=vendor,
        )
        return address

    def _fail(self, index: int, message: str) -> None:
        raise self._source.error(Fault(index, message))
