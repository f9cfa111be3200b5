# SPDX-License-Identifier: Apache-2.0
"""What the guest's kernel must make of a rack, predicted from its placement.

IOMMU groups follow Linux 7.2 ``drivers/iommu/iommu.c`` (``pci_device_group``) and
``drivers/pci/pci.c`` (``pci_acs_enabled``, ``pci_acs_path_enabled``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from testbed.topology.model import Node
from testbed.topology.plan import Function, NodePlan, Role

# q35's own functions, which are no part of a plan: the host bridge and the ICH9's ISA bridge.
CHIPSET_BDFS = ("0000:00:00.0", "0000:00:1f.0")


def iommu_groups(plan: NodePlan, node: Node) -> tuple[frozenset[str], ...]:
    """The groups that sysfs will show, each a set of ``0000:BB:SS.F``, ordered by their first.

    Empty if there is no IOMMU or the kernel is told not to use it.
    """
    if node.iommu.mode == "off":
        return ()
    walk = _Walk.over(plan)
    groups: dict[str, set[str]] = {}
    for function in plan.functions:
        if function.role is not Role.IOMMU:
            groups.setdefault(walk.group_of(function), set()).add(function.bdf)
    members = [*groups.values(), *({bdf} for bdf in CHIPSET_BDFS)]
    return tuple(sorted((frozenset(group) for group in members), key=min))


@dataclass(frozen=True)
class _Walk:
    """The kernel's walk from a device towards the root."""

    bridges: Mapping[str, Function]  # by qemu_id
    slots: Mapping[tuple[int, int], list[Function]]  # by bus and slot

    @classmethod
    def over(cls, plan: NodePlan) -> _Walk:
        slots: dict[tuple[int, int], list[Function]] = {}
        for function in plan.functions:
            slots.setdefault((function.bus, function.slot), []).append(function)
        return cls({f.qemu_id: f for f in plan.functions if f.secondary_bus}, slots)

    def group_of(self, function: Function) -> str:
        """The name of a function's group: the ``qemu_id`` of the one that founds it."""
        bridge = self.bridges.get(function.parent)
        if bridge and not self._is_isolated_up_to_root(bridge):
            return self.group_of(bridge)
        if self._is_isolated(function):
            return function.qemu_id
        # Functions of one slot may reach one another inside the device.
        partners = self.slots[function.bus, function.slot]
        return min(
            (f for f in partners if not self._is_isolated(f)), key=lambda f: f.number
        ).qemu_id

    def _is_isolated_up_to_root(self, bridge: Function) -> bool:
        """``pci_acs_path_enabled``: every step from here to the root keeps peers apart."""
        above = self.bridges.get(bridge.parent)
        return self._is_isolated(bridge) and (above is None or self._is_isolated_up_to_root(above))

    def _is_isolated(self, function: Function) -> bool:
        """``pci_acs_enabled``: a port needs ACS, which the kernel then turns on; a device that is
        the only function of its slot has no peer to be kept apart from."""
        if function.kind == "igb":
            return True  # drivers/pci/quirks.c: the 82576 has no ACS and is known to need none
        if function.role in (Role.ROOT_PORT, Role.SWITCH_DOWNSTREAM):
            return function.acs
        return not function.multifunction
