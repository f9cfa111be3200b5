# SPDX-License-Identifier: Apache-2.0
"""lspci's blocks: a line for each function, and below it what -v and -x add.

Formats: pciutils 3.13 ``lspci.c`` (show_terse, show_verbose, show_hex_dump) and ``ls-ecaps.c``. The
configuration space, if it is there, counts for more than the words made of it. The parsers that
exist in Python read the machine-readable forms, which have neither bus numbers nor ACS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from guest_agent.observe import pci
from testbed.topology.importers import kinds
from testbed.topology.importers.bridges import Function, PortType
from testbed.topology.importers.machine import Acs, Address, Kind, parse_address
from testbed.topology.importers.source import Deadline, plain
from testbed.topology.source import Fault, Source
from testbed.topology.units import MAX_SIZE_BYTES

MOST_FUNCTIONS = 20_000
_LONGEST_LINE = 2048  # more of a line is not looked at
_CHECK_EVERY = 4096

# Quoted or indented, as in a mail or a Markdown page; all lines then start alike.
_HEADER = re.compile(
    r"(?P<prefix>[ \t>]*)(?P<address>(?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])"
    r"[ \t]+(?P<rest>\S.*)",
    re.IGNORECASE | re.ASCII,
)
_NUMERIC = re.compile(
    r"(?:Class )?\[?(?P<code>[0-9a-f]{4})\]?: (?:Device )?\[?(?P<vendor>[0-9a-f]{4}):"
    r"(?P<device>[0-9a-f]{4})\]?",
    re.IGNORECASE | re.ASCII,
)
_CLASS_NUMBER = re.compile(r"\[([0-9a-f]{4})\]:", re.IGNORECASE | re.ASCII)
_IDS = re.compile(r"(?:\[|Device )([0-9a-f]{4}):([0-9a-f]{4})\b", re.IGNORECASE | re.ASCII)
_BUS = re.compile(r"Bus: primary=[0-9a-f]{2}, secondary=([0-9a-f]{2})", re.IGNORECASE | re.ASCII)
_REGION = re.compile(r"(?:Region [0-5]: )?Memory at .*\[size=([0-9]{1,6})([KMGT]?)\]")
_CAPABILITY = re.compile(r"Capabilities: \[([0-9a-f]{2,3})(?: v[0-9]+)?\] (.*)", re.IGNORECASE)
_ACS_CONTROL = re.compile(r"ACSCtl:.*?ReqRedir([+-]) CmpltRedir([+-]).*?EgressCtrl([+-])")
_IOMMU_GROUP = re.compile(r"IOMMU group: ([0-9]{1,6})")
_HEX = re.compile(r"(?: [0-9a-f]{2})+", re.IGNORECASE | re.ASCII)
_HEX_LENGTH = 16 * len(" 00")
_HEX_START = re.compile(r"[0-9a-f]{2,3}:(?: |$)", re.IGNORECASE | re.ASCII)

# What the lines that matter start with: Access Control, Bus, Capabilities, IOMMU, Memory, Region.
_ATTRIBUTES = frozenset("ABCIMR")
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LEAST_CONFIG_BYTES = 64
_MOST_CONFIG_BYTES = 4096
_EXTENDED_START = 0x100

_EXPRESS_TYPES = (
    ("Root Port", PortType.EXPRESS),
    ("Downstream Port", PortType.EXPRESS),
    ("Upstream Port", PortType.UPSTREAM),
    ("PCI-Express to PCI", PortType.CONVENTIONAL),
)
_CONFIG_TYPES = {
    "root_port": PortType.EXPRESS,
    "downstream": PortType.EXPRESS,
    "upstream": PortType.UPSTREAM,
}


@dataclass
class Block:
    """What the file says of one function."""

    address: Address
    line: int
    words: str
    class_code: int = 0
    vendor: int = 0
    device: int = 0
    secondary: int = 0
    port: PortType | None = None
    memory_bytes: int = 0
    denied: bool = False
    iommu_group: str = ""
    has_capabilities: bool = False
    has_extended: bool = False
    has_acs: bool = False
    acs_control: bool | None = None  # whether its ACS redirects peers; None if it is not shown
    config: bytearray = field(default_factory=bytearray)

    @property
    def is_bridge(self) -> bool:
        """Whether it is a bridge from PCI to PCI."""
        return self.class_code == kinds.PCI_BRIDGE

    def function(self, *, is_all_shown: bool) -> Function:
        """The function, as the tree needs it; ``is_all_shown``: lspci could read capabilities."""
        acs = Acs.UNKNOWN
        if self.acs_control is not None:
            acs = Acs.REDIRECT if self.acs_control else Acs.OFF
        elif not self.has_acs and (self.has_extended or (is_all_shown and self.has_capabilities)):
            acs = Acs.NONE
        kind = kinds.of_class(self.class_code, self.vendor, self.device)
        return Function(
            address=self.address,
            line=self.line,
            kind=kind,
            port=(self.port or PortType.UNKNOWN) if self.is_bridge else None,
            what=plain(self.words, 90),
            vendor=self.vendor,
            acs=acs,
            memory_bytes=self.memory_bytes if kind is Kind.GPU else 0,
        )


def parse(source: Source, deadline: Deadline) -> dict[Address, Block]:
    """Every function's block, by address; lines that belong to none are passed over."""
    reader = _Reader(source)
    offset = 0
    for number, line in enumerate(source.text.split("\n")):
        if number % _CHECK_EVERY == 0:
            deadline.check()
        reader.line(line[:_LONGEST_LINE], offset, number + 1)
        offset += len(line) + 1
    reader.end_block()
    return reader.blocks


class _Reader:
    def __init__(self, source: Source) -> None:
        self.blocks: dict[Address, Block] = {}
        self._source = source
        self._prefix = ""
        self._block: Block | None = None
        self._hex_index = 0

    def line(self, text: str, index: int, number: int) -> None:
        """One line; ``index`` is where it starts in the source."""
        body = text.removeprefix(self._prefix)
        block = self._block
        # Most lines are one of these two, and the costlier look for a header is spared them.
        if block is not None and body[:1] in ("\t", " "):
            _attribute(block, body.strip())
            return
        if block is not None and _HEX_START.match(body):
            self._hex(block, body, index + len(text) - len(body))
            return
        header = _HEADER.match(text)
        if header and (not self.blocks or header["prefix"] == self._prefix):
            self.end_block()
            self._prefix = header["prefix"]
            self._block = self._start(header, index, number)
        elif body.strip(" \t>"):
            self.end_block()  # a prompt, or the next command's output

    def _start(self, header: re.Match[str], index: int, number: int) -> Block:
        index += header.start("address")
        address = parse_address(header["address"])
        if address is None:
            message = f"'{header['address']}' is no PCI address"
            expected = "slots up to 1f and functions up to 7"
            raise self._source.error(Fault(index, message, expected))
        if address in self.blocks:
            first = self.blocks[address].line
            message = f"{address} stands here twice; the first is in line {first}"
            raise self._source.error(Fault(index, message, "one lspci's output"))
        if len(self.blocks) >= MOST_FUNCTIONS:
            raise self._source.error(Fault(index, f"more than {MOST_FUNCTIONS} PCI functions"))
        block = _block(address, number, header["rest"])
        self.blocks[address] = block
        return block

    def _hex(self, block: Block, text: str, index: int) -> None:
        """A line of the configuration space: 16 bytes, at the next offset."""
        offset, _, words = text.rstrip().partition(":")
        if len(words) != _HEX_LENGTH or not _HEX.fullmatch(words):
            fault = Fault(index, "a damaged line of configuration space", "16 bytes")
            raise self._source.error(fault)
        expected = len(block.config)
        if int(offset, 16) != expected or expected >= _MOST_CONFIG_BYTES:
            message = f"configuration space at {offset} where {expected:02x} should come"
            raise self._source.error(Fault(index, message))
        block.config += bytes.fromhex(words)
        self._hex_index = index

    def end_block(self) -> None:
        """Take what the configuration space says, now that all of it is there."""
        block, self._block = self._block, None
        if block is None or not block.config:
            return
        if len(block.config) < _LEAST_CONFIG_BYTES:
            message = f"{len(block.config)} bytes of configuration space for {block.address}"
            expected = f"at least {_LEAST_CONFIG_BYTES}"
            raise self._source.error(Fault(self._hex_index, message, expected))
        _take_config(block, bytes(block.config))
        block.config.clear()


def _block(address: Address, line: int, rest: str) -> Block:
    """A block from its first line, in any of lspci's three ways to write it."""
    numeric = _NUMERIC.match(rest)
    if numeric:
        code, vendor, device = (int(numeric[n], 16) for n in ("code", "vendor", "device"))
        return Block(address, line, rest.partition(": ")[2], code, vendor, device)
    class_number, ids = _CLASS_NUMBER.search(rest), _IDS.findall(rest)
    class_name, _, words = rest.partition(" (prog-if ")[0].partition(": ")
    if class_number:
        code = int(class_number[1], 16)
    else:
        code = kinds.CLASS_NAMES.get(class_name.strip().lower(), 0)
    vendor, device = (int(digits, 16) for digits in ids[-1]) if ids else kinds.ids_of_name(words)
    return Block(address, line, words, code, vendor, device)


def _attribute(block: Block, text: str) -> None:
    """One of the indented lines below a function's first."""
    if text[:1] not in _ATTRIBUTES:
        return
    if text.startswith("Bus:"):
        match = _BUS.match(text)
        block.secondary = int(match[1], 16) if match else 0
    elif text.startswith(("Region ", "Memory at ")):
        match = _REGION.match(text)
        if match:
            size_bytes = min(int(match[1]) * _SIZES[match[2]], MAX_SIZE_BYTES)
            block.memory_bytes = max(block.memory_bytes, size_bytes)
    elif text.startswith("Capabilities:"):
        _capability(block, text)
    elif text.startswith("ACSCtl:"):
        match = _ACS_CONTROL.match(text)
        if match:
            block.acs_control = "+" in match.groups()
    elif text.startswith("IOMMU group:"):
        match = _IOMMU_GROUP.match(text)
        block.iommu_group = match[1] if match else ""


def _capability(block: Block, text: str) -> None:
    if "<access denied>" in text:
        block.denied = True
        return
    match = _CAPABILITY.match(text)
    if match is None:
        return
    block.has_capabilities = True
    block.has_extended |= int(match[1], 16) >= _EXTENDED_START
    if match[2].startswith("Express"):
        types = (port for words, port in _EXPRESS_TYPES if words in match[2])
        block.port = next(types, None)
    elif match[2].startswith("Access Control Services"):
        block.has_acs = True


def _take_config(block: Block, config: bytes) -> None:
    """Identifiers, bus numbers, kind of port and ACS out of the configuration space."""
    block.vendor = int.from_bytes(config[0:2], "little")
    block.device = int.from_bytes(config[2:4], "little")
    block.class_code = int.from_bytes(config[10:12], "little")
    if block.is_bridge:
        block.secondary = config[pci.PRIMARY_BUS + 1]
    port = _CONFIG_TYPES.get(pci.pcie_type(config))
    block.port = port or block.port
    if any(pci.extended_capabilities(config)):
        block.has_extended = True
        acs = pci.acs(config)
        block.has_acs = acs is not None
        block.acs_control = None if acs is None else bool(acs["redirect"])
