# SPDX-License-Identifier: Apache-2.0
"""The agent's methods around device-private memory: pages in video memory, mirrored by devices."""

from __future__ import annotations

from guest_agent.kernel_methods import registry
from guest_agent.p2p.command_file import BOUNCE_BYTES
from guest_agent.p2p.private_memory import PrivateMemory
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.agent import Agent

_PAGE_BYTES = 4096


@registry.method("hmm.bind")
def _bind(agent: Agent, *, device: str) -> dict[str, Any]:
    """Let ``hmm_peer`` drive a function: a video memory or an engine."""
    agent.area(PrivateMemory).bind(device)
    return {}


@registry.method("hmm.unbind")
def _unbind(agent: Agent, *, device: str) -> dict[str, Any]:
    """Take a function from ``hmm_peer``; pages in its memory come back to the process."""
    agent.area(PrivateMemory).unbind(device)
    return {}


@registry.method("hmm.release")
def _release(agent: Agent) -> dict[str, Any]:
    """End every mirror, free every memory, give every function back."""
    agent.end_area(PrivateMemory)
    return {}


@registry.method("hmm.alloc")
def _alloc(agent: Agent, *, name: str, pages: int) -> dict[str, Any]:
    """Private anonymous memory of the agent."""
    agent.area(PrivateMemory).alloc(name, pages)
    return {}


@registry.method("hmm.pages")
def _pages(agent: Agent, *, name: str) -> dict[str, list[int]]:
    """The physical address of each page, -1 if it is not in system memory; faults nothing in."""
    return {"physical": agent.area(PrivateMemory).pages(name)}


@registry.method("hmm.write")
def _write(
    agent: Agent,
    *,
    name: str,
    page: int,
    hex: str,  # noqa: A002  the protocol's word
) -> dict[str, Any]:
    """By the CPU, which faults the page in."""
    agent.area(PrivateMemory).memory(name).write(page * _PAGE_BYTES, bytes.fromhex(hex))
    return {}


@registry.method("hmm.read")
def _read(agent: Agent, *, name: str, page: int) -> dict[str, str]:
    """By the CPU, which faults the page in."""
    memory = agent.area(PrivateMemory).memory(name)
    return {"hex": memory.read(page * _PAGE_BYTES, _PAGE_BYTES).hex()}


@registry.method("hmm.take")
def _take(agent: Agent, *, name: str, device: str) -> dict[str, Any]:
    """Migrate a memory to a device: ``{errno, moved, offsets}``, in its BAR, by page."""
    first, *rest = agent.area(PrivateMemory).take(name, device)
    return {"moved": 0, **first, "offsets": {str(each["page"]): each["offset"] for each in rest}}


@registry.method("hmm.owner")
def _owner(agent: Agent, *, device: str) -> dict[str, Any]:
    """``{used, to_ram}``: pages in use now, and pages that faults have taken back."""
    return agent.area(PrivateMemory).owner(device)


@registry.method("hmm.mirror")
def _mirror(
    agent: Agent, *, mirror: str, name: str, device: str, manners: list[str]
) -> dict[str, Any]:
    """``{errno, told, pages: [{address, kind, bus}]}``; ``manners`` are the module's words."""
    first, *rest = agent.area(PrivateMemory).mirror(mirror, name, device, manners)
    return {**first, "pages": rest}


@registry.method("hmm.state")
def _mirror_state(agent: Agent, *, mirror: str) -> dict[str, Any]:
    """As ``hmm.mirror``, now."""
    first, *rest = agent.area(PrivateMemory).tell(mirror, "state")
    return {**first, "pages": rest}


@registry.method("hmm.dma_write")
def _dma_write(
    agent: Agent,
    *,
    mirror: str,
    page: int,
    hex: str,  # noqa: A002  the protocol's word
    stale: bool = False,
) -> dict[str, Any]:
    """Let the device write to a page; ``stale``: by the address that it was given last."""
    data, state = bytes.fromhex(hex), agent.area(PrivateMemory)
    if not 0 < len(data) <= BOUNCE_BYTES:
        raise ParameterError(f"hex: 1 to {BOUNCE_BYTES} bytes, not {len(data)}")
    state.put(mirror, data)
    return state.tell(mirror, f"dma to {page} {len(data)}{' stale' * stale}")[0]


@registry.method("hmm.dma_read")
def _dma_read(agent: Agent, *, mirror: str, page: int) -> dict[str, Any]:
    """Let the device read a page: ``{errno, hex}``."""
    state = agent.area(PrivateMemory)
    state.put(mirror, bytes(_PAGE_BYTES))
    answer = state.tell(mirror, f"dma from {page} {_PAGE_BYTES}")[0]
    return {**answer, "hex": state.get(mirror, _PAGE_BYTES).hex()}
