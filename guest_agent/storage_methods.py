# SPDX-License-Identifier: Apache-2.0
"""The agent's methods around the kernel's own peer-to-peer DMA: disks, ``p2pmem``, ACS of ports."""

from __future__ import annotations

from guest_agent.hw import storage
from guest_agent.kernel_methods import registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.agent import Agent


@registry.method("nvme.namespaces")
def _nvme_namespaces(_agent: Agent) -> dict[str, dict[str, Any]]:
    storage.start()
    return storage.namespaces()


@registry.method("nvme.transfer")
def _nvme_transfer(
    agent: Agent,
    *,
    device: str,
    target: dict[str, Any],
    size_bytes: int,
    disk_offset: int = 0,
    write: bool = False,
) -> dict[str, Any]:
    region = agent.region("target", target)
    offset = target.get("offset", 0)
    return storage.transfer(device, region, offset, size_bytes, disk_offset, write)


@registry.method("acs.set")
def _acs_set(_agent: Agent, *, device: str, control: int) -> dict[str, int]:
    from guest_agent.hw import acs  # noqa: PLC0415  loaded when needed

    return {"old": acs.set_control(device, control)}


@registry.method("p2pmem.providers")
def _p2pmem_providers(_agent: Agent) -> dict[str, dict[str, Any]]:
    storage.start()
    return storage.providers()


@registry.method("p2pmem.alloc")
def _p2pmem_alloc(
    agent: Agent, *, name: str, provider: str, size_bytes: int
) -> dict[str, int | None]:
    """Under ``name`` it is then as a buffer of ``memory.alloc``."""
    return {"physical": agent.buffers.adopt(name, storage.allocate(provider, size_bytes))}
