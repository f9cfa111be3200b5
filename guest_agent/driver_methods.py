# SPDX-License-Identifier: Apache-2.0
"""The agent's methods that lend functions to a driver, for programs other than this one."""

from __future__ import annotations

import errno

from guest_agent import modules, sysfs
from guest_agent.hw import binding
from guest_agent.kernel_methods import registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.agent import Agent

_VFIO_MODULES = ("vfio_pci", "vfio_iommu_type1")
_UNSAFE_INTERRUPTS = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"


class Lent:
    """Functions that VFIO owns and nobody here has open, until :meth:`close`."""

    def __init__(self) -> None:
        self._bindings: list[binding.Binding] = []

    def take(self, bdfs: list[str], held: set[str]) -> dict[str, str]:
        """Let vfio-pci own them, and whatever shares an IOMMU group with them.

        :returns: the group of each.
        :raises OSError: ENODEV: no IOMMU group; EBUSY: open here; others: the driver refused.
        """
        binding.check_names(bdfs)
        groups: dict[str, str] = {}
        for bdf in bdfs:
            groups[bdf] = sysfs.link_name(f"{sysfs.ROOT}/bus/pci/devices/{bdf}/iommu_group")
            if not groups[bdf]:
                raise OSError(errno.ENODEV, f"{bdf} is in no IOMMU group")
        for module in _VFIO_MODULES:
            modules.load(module)
        members = [m for group in dict.fromkeys(groups.values()) for m in binding.endpoints(group)]
        binding.check_free(members, held)
        try:
            for bdf in members:
                self._bindings.append(binding.Binding(bdf, binding.VFIO_DRIVER))
        except BaseException:
            self.close()
            raise
        return groups

    def close(self) -> None:
        """Give them back to the drivers that had them."""
        binding.restore(self._bindings)


@registry.method("driver.lend")
def _lend(
    agent: Agent, *, devices: list[str], unsafe_interrupts: bool = False
) -> dict[str, dict[str, str]]:
    """``unsafe_interrupts``: the IOMMU remaps none (virtio), and VFIO shall not mind."""
    groups = agent.area(Lent).take(devices, agent.held())
    if unsafe_interrupts:
        sysfs.write(_UNSAFE_INTERRUPTS, "Y")
    return {"groups": groups}


@registry.method("driver.give_back")
def _give_back(agent: Agent) -> dict[str, Any]:
    agent.area(Lent).close()
    return {}
