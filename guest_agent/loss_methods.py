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


def _loss(agent: Agent) -> loss.Loss:
    made = agent.area_state.setdefault("loss", loss.Loss())
    if not isinstance(made, loss.Loss):
        raise TypeError("another area is called loss")
    return made


@registry.method("loss.unbind")
def _unbind(agent: Agent, *, device: str, timeout_s: float) -> dict[str, Any]:
    """``{ended, seconds}``: whether the kernel was done with it in time."""
    return _loss(agent).unbind(device, timeout_s)


@registry.method("loss.rebind")
def _rebind(agent: Agent, *, device: str, timeout_s: float) -> dict[str, Any]:
    return _loss(agent).rebind(device, timeout_s)


@registry.method("loss.touch")
def _touch(agent: Agent, *, target: dict[str, Any]) -> dict[str, int]:
    """The signal that a process gets which reads the first byte, or 0."""
    return loss.touch(agent.region("target", target), _TOUCH_S)


@registry.method("loss.start")
def _start(agent: Agent, *, device: str, target: dict[str, Any], size_bytes: int) -> dict[str, Any]:
    """Read from a disk into memory, again and again, until ``loss.end``."""
    _loss(agent).start(device, agent.region("target", target), size_bytes)
    return {}


@registry.method("loss.progress")
def _progress(agent: Agent) -> dict[str, int]:
    return {"transfers": _loss(agent).progress()}


@registry.method("loss.end")
def _end(agent: Agent, *, timeout_s: float) -> dict[str, Any]:
    """``{transfers, error, by_itself, ended}``."""
    return _loss(agent).end(timeout_s)
