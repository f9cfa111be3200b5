# SPDX-License-Identifier: Apache-2.0
"""The agent's methods around IOMMU groups and their default domains."""

from __future__ import annotations

from guest_agent.hw import binding
from guest_agent.kernel_methods import registry
from guest_agent.observe import iommu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.agent import Agent


@registry.method("iommu.groups")
def _iommu_groups(_agent: Agent) -> list[dict[str, Any]]:
    return iommu.groups()


@registry.method("iommu.set_type")
def _iommu_set_type(agent: Agent, *, group: int, type: str) -> dict[str, str]:  # noqa: A002
    # The kernel changes a domain only while nobody does DMA through it.
    members = binding.endpoints(str(group))
    binding.check_free(members, agent.held())
    taken = [binding.Binding(bdf, "") for bdf in members]
    try:
        return iommu.set_type(group, type)
    finally:
        binding.restore(taken)
