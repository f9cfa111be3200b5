# SPDX-License-Identifier: Apache-2.0
"""The agent's methods around devices that go away while they are used."""

from __future__ import annotations

from guest_agent.hw import loss
from guest_agent.kernel_methods import registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.agent import Agent

_TOUCH_S = 5.0


@registry.method("loss.unbind")
def _unbind(agent: Agent, *, device: str, timeout_s: float) -> dict[str, Any]:
    """``{ended, seconds}``: whether the kernel was done with it in time."""
    return agent.area(loss.Loss).unbind(device, timeout_s)


@registry.method("loss.rebind")
def _rebind(agent: Agent, *, device: str, timeout_s: float) -> dict[str, Any]:
    return agent.area(loss.Loss).rebind(device, timeout_s)


@registry.method("loss.touch")
def _touch(agent: Agent, *, target: dict[str, Any]) -> dict[str, int]:
    """The signal that a process gets which reads the first byte, or 0."""
    return loss.touch(agent.region("target", target), _TOUCH_S)


@registry.method("loss.start")
def _start(agent: Agent, *, device: str, target: dict[str, Any], size_bytes: int) -> dict[str, Any]:
    """Read from a disk into memory, again and again, until ``loss.end``."""
    agent.area(loss.Loss).start(device, agent.region("target", target), size_bytes)
    return {}


@registry.method("loss.progress")
def _progress(agent: Agent) -> dict[str, int]:
    return {"transfers": agent.area(loss.Loss).progress()}


@registry.method("loss.end")
def _end(agent: Agent, *, timeout_s: float) -> dict[str, Any]:
    """``{transfers, error, by_itself, ended}``."""
    return agent.area(loss.Loss).end(timeout_s)
