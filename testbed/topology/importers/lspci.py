# SPDX-License-Identifier: Apache-2.0
"""lspci's text to a machine: from the functions' own blocks, or from the tree of ``-t``.

The kernel's rule for peers in different branches is applied to the host bridges that the file
names (Linux 7.2 ``drivers/pci/p2pdma.c``, ``pci_p2pdma_whitelist``).
"""

from __future__ import annotations

from collections.abc import Mapping

from testbed.topology.importers import kinds, lspci_blocks, lspci_tree
from testbed.topology.importers.bridges import Function, TreeMaker, assemble
from testbed.topology.importers.lspci_blocks import Block
from testbed.topology.importers.machine import Address, Machine, Notes, Part, counted
from testbed.topology.importers.source import Deadline, decode
from testbed.topology.oracle import Cpu, MapType, through_host
from testbed.topology.source import Fault

_EXPECTED = "the output of `lspci -nnvvv -xxx` (or -vvv, or -tv)"


def read(name: str, content: bytes) -> Machine:
    """The machine in a file's bytes; InputError with the place of the first fault."""
    source = decode(name, content)
    deadline = Deadline(name)
    notes = Notes()
    blocks = lspci_blocks.parse(source, deadline)
    tree = lspci_tree.parse(source, deadline)
    if not blocks and not tree.functions:
        raise source.error(Fault(0, "no line is about a PCI function", _EXPECTED))
    if blocks:
        # Capabilities beyond 256 bytes are shown of one function if they can be of all.
        is_all_shown = any(block.has_extended for block in blocks.values())
        functions = {a: block.function(is_all_shown=is_all_shown) for a, block in blocks.items()}
        secondary = {a: b.secondary for a, b in blocks.items() if b.secondary}
        if not secondary and tree.functions:
            # `lspci -t` before a plain `lspci`: the one has the bridges, the other the names.
            secondary = {a: bus for a, bus in tree.secondary.items() if a in functions}
        _say_unknown(blocks, secondary, notes)
    else:
        functions, secondary = tree.functions, tree.secondary
        notes.unknown.append(
            "classes of devices, which -t does not print: guessed from their names "
            "(say otherwise with --as ADDRESS=gpu|nic|nvme|other)"
        )
    maker = TreeMaker(name, notes)
    buses = assemble(functions, secondary, name)
    roots: list[Part] = []
    for bus_functions in buses.values():
        roots += maker.root_bus(bus_functions, is_lost=_is_lost(bus_functions, blocks))
    maker.say()
    host_buses = [on_bus for on_bus in buses.values() if not _is_lost(on_bus, blocks)]
    if secondary and len(host_buses) > 1:
        notes.changed.append(f"{len(host_buses)} root buses: all stands on one")
    return Machine("lspci", tuple(roots), notes, peers_through_host=_peers_through_host(blocks))


def _is_lost(functions: tuple[Function, ...], blocks: Mapping[Address, Block]) -> bool:
    """Whether a bus that no bridge in the file leads to is, all the same, not a root bus."""
    first = functions[0].address
    if first.bus == 0 or not blocks:
        return False
    return not any(blocks[f.address].class_code == kinds.HOST_BRIDGE for f in functions) and (
        all(function.address.slot == 0 for function in functions)
    )


def _say_unknown(
    blocks: Mapping[Address, Block], secondary: Mapping[Address, int], notes: Notes
) -> None:
    if not secondary and any(block.is_bridge for block in blocks.values()):
        notes.unknown.append(
            "which devices are behind which bridge: the file has no bus numbers (-v prints them)"
        )
    if any(block.denied for block in blocks.values()):
        notes.unknown.append("capabilities: lspci was not run as root")
    has_groups = any(block.iommu_group for block in blocks.values())
    if has_groups:
        count = len({block.iommu_group for block in blocks.values()} - {""})
        notes.changed.append(
            f"{counted(count, 'IOMMU group')} in the file: the rack's follow from its own ports"
        )


def _peers_through_host(blocks: Mapping[Address, Block]) -> bool | None:
    """What Linux would answer for the host bridges in the file; None if there are none."""
    bridges = [
        (block.vendor, block.device)
        for address, block in blocks.items()
        if block.class_code == kinds.HOST_BRIDGE and (address.slot, address.number) == (0, 0)
    ]
    answers = {_is_allowed(vendor, device) for vendor, device in bridges if vendor}
    return answers.pop() if len(answers) == 1 else None


def _is_allowed(vendor: int, device: int) -> bool | None:
    if vendor in (kinds.AMD, kinds.HYGON):
        # Every host bridge of AMD that has PCI Express GPUs of today behind it is a Zen's.
        return True
    if not device:
        return None
    answer = through_host(Cpu("", 0), (vendor, device))
    return answer is MapType.HOST_BRIDGE
