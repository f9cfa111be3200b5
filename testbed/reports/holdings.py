# SPDX-License-Identifier: Apache-2.0
"""What the steps of a report hold of their rack: nodes, and devices taken into containers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from testbed.errors import CapabilityMissing, TestbedError
from testbed.instruments.bench import Bench, dma_functions
from testbed.instruments.interface import Rack, RackNode
from testbed.reports.places import PlaceFound, find_functions
from testbed.reports.seen import Seen
from testbed.reports.steps import Close, Open
from testbed.topology.plan import Function


@dataclass(frozen=True)
class Opened:
    """A container and the devices in it; ``is_raw``: nothing translates, bus addresses go as is."""

    node: str
    devices: frozenset[str]
    bench: Bench
    is_raw: bool


class Holdings:
    """The rack while a report's steps are done, and the devices that are open."""

    def __init__(self, rack: Rack) -> None:
        self.rack = rack
        self._opened: list[Opened] = []

    def node(self, name: str) -> RackNode:
        """The node of that name; the first if it is empty."""
        return self.rack.nodes[name or next(iter(self.rack.nodes))]

    def real_node(self, name: str) -> Any:
        """A node with a shell and a kernel; CapabilityMissing."""
        node = self.node(name)
        if not hasattr(node, "link"):
            raise CapabilityMissing("this rack's nodes have no shell and no kernel")
        return node

    def functions(self, word: str) -> tuple[str, list[Function]]:
        """A device's node and functions, the one that does DMA first."""
        found = find_functions(self.rack.plan, word)
        return found[0][0], [function for _, function in found]

    def open(self, step: Open) -> Seen:
        """Take devices from their drivers, a container for each node."""
        by_node: dict[str, list[Function]] = {}
        names: dict[str, set[str]] = {}
        for word in step.devices:
            node, functions = self.functions(word)
            by_node.setdefault(node, []).extend(dma_functions(functions) or functions)
            names.setdefault(node, set()).add(functions[0].device)
        for name, functions in by_node.items():
            iommu = self.rack.topology.nodes[name].iommu
            translates = iommu.kind != "none" and iommu.mode not in ("off", "passthrough")
            is_raw = step.domain == "kernel" and not translates
            if not is_raw and iommu.mode == "off":
                raise CapabilityMissing("IOMMU off: VFIO needs one (`domain: kernel` does not)")
            opener = Bench.open_raw if is_raw else Bench.open
            bench = opener(self.node(name), functions)
            self._opened.append(Opened(name, frozenset(names[name]), bench, is_raw))
        return Seen({"devices": len(step.devices)})

    def close(self, step: Close) -> Seen:
        """Give the container of a device back."""
        node, functions = self.functions(step.device)
        for each in list(self._opened):
            if each.node == node and functions[0].device in each.devices:
                self._opened.remove(each)
                each.bench.close()
        return Seen()

    def opened(self, node: str, device: str) -> Opened:
        """The container that a device is in; TestbedError if it is in none."""
        for each in self._opened:
            if each.node == node and device in each.devices:
                return each
        raise TestbedError(f"'{device}' is not open")

    def first_of(self, node: str) -> Opened:
        """The node's first container."""
        return next(each for each in self._opened if each.node == node)

    def is_closed(self, place: PlaceFound) -> bool:
        """A BAR of a device that was not opened: a driver of the kernel's may have it."""
        function = place.function
        return function is not None and not any(
            each.node == place.node and function.device in each.devices for each in self._opened
        )
