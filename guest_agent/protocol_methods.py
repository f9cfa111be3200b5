# SPDX-License-Identifier: Apache-2.0
"""Methods ``protocol.*``: the core of :mod:`guest_agent.p2p` on this machine's devices.

``protocol.open`` makes a room of devices that are open already (``vfio.open``, ``gpu.open``,
``engine.open``), ``protocol.run`` does steps in it (:mod:`guest_agent.p2p_device.steps`), and
``protocol.events`` tells what happened. Only one room at a time.
"""

from __future__ import annotations

from guest_agent import rpc
from guest_agent.hw.gpu import Gpu
from guest_agent.hw.model import ModelNic, Ring
from guest_agent.kernel_methods import registry
from guest_agent.p2p_device import (
    buffer_steps,  # noqa: F401  these join the table of steps
    device_steps,  # noqa: F401
    sharing,  # noqa: F401
    soak,  # noqa: F401
)
from guest_agent.p2p_device.members import STAGING_BYTES, Member
from guest_agent.p2p_device.ranges import PAGE_BYTES, Ranges
from guest_agent.p2p_device.room import Room
from guest_agent.p2p_device.steps import STEPS
from guest_agent.p2p_device.steps import run as run_steps
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from guest_agent.agent import Agent

_MEMBER = {"name": "str", "container": "int", "engine": "int", "iova": "int", "iova_bytes": "int"}
_MEMBER_MAY = {"vram": "dict[str, Any]", "links": "dict[str, Any]"}
_VRAM = {"bar": "str", "index": "int", "offset": "int", "size_bytes": "int"}


def _room(agent: Agent) -> Room:
    found = agent.room
    if not isinstance(found, Room):
        raise ParameterError("protocol.open comes first")
    return found


def _member(agent: Agent, name: str, value: dict[str, Any]) -> Member:
    rpc.check_parts(name, value, _MEMBER, _MEMBER_MAY)
    container, engine = agent.vfio(value["container"]), agent.engine(value["engine"])
    if not isinstance(engine, Gpu | ModelNic) or not isinstance(engine, Ring):
        raise ParameterError(f"{name}.engine: {engine.kind} cannot take part; models can")
    iovas = Ranges(value["iova"], value["iova_bytes"], guard_bytes=PAGE_BYTES, rotate=True)
    if "vram" not in value:
        ram = f"staging-{value['name']}"
        agent.buffers.alloc(ram, STAGING_BYTES)
        region, at = agent.buffers.get(ram), iovas.take(STAGING_BYTES)
        if at is None:
            raise ParameterError(f"{name}.iova_bytes: {STAGING_BYTES} at least")
        container.map(region, 0, at, STAGING_BYTES, read=True, write=True, page_bytes=0)
        return Member(
            value["name"],
            container,
            engine,
            iovas,
            vram=None,
            memory=None,
            staging=region,
            staging_offset=0,
            staging_at=at,
            links={},
        )
    vram = value["vram"]
    rpc.check_parts(f"{name}.vram", vram, _VRAM, {})
    memory = agent.region(f"{name}.vram", {"bar": vram["bar"], "index": vram["index"]})
    own = STAGING_BYTES + PAGE_BYTES
    member = Member(
        value["name"],
        container,
        engine,
        iovas,
        vram=memory,
        memory=Ranges(vram["offset"] + own, vram["size_bytes"] - own),
        staging=memory,
        staging_offset=vram["offset"],
        staging_at=vram["offset"],
        links=dict(value.get("links", {})),
    )
    member.go_on()
    return member


def breaks() -> ModuleType:
    """The module of deliberate breaks, loaded only to see a FAIL."""
    from guest_agent.p2p_device import breaks as module  # noqa: PLC0415  seldom

    return module


@registry.method("protocol.open")
def protocol_open(
    agent: Agent,
    *,
    members: list[dict[str, Any]],
    topology: dict[str, Any],
    policy: str = "best-quality",
    forwards: bool = True,
    broken: str = "",
) -> dict[str, list[str]]:
    """Each member: ``{name, container, engine, iova, iova_bytes}``, addresses that are free in its
    container; a GPU's ``vram``: ``{bar, index, offset, size_bytes}``, and ``links``: numbers by
    port. ``topology``: see ``topology_from``. ``broken``: a deliberate break (``breaks``).
    """
    if agent.room is not None:
        raise ParameterError("protocol.open: there is a room already")
    made = {
        each["name"]: _member(agent, f"members[{index}]", each)
        for index, each in enumerate(members)
    }
    room = Room(made, agent.buffers, topology, policy, forwards=forwards)
    if broken:
        breaks().apply(broken)
        room.broken = True
    agent.room = room
    return {"steps": sorted(STEPS)}


@registry.method("protocol.rules")
def protocol_rules(
    agent: Agent,
    *,
    policy: str = "",
    forwards: bool = True,
    topology: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Go on under another policy, with or without the host's answers, with other facts."""
    from guest_agent.p2p.policies import policy_of  # noqa: PLC0415  seldom
    from guest_agent.p2p_device.room import HostForwarder  # noqa: PLC0415  seldom

    room = _room(agent)
    if topology is not None:
        room.know(topology)
    if policy:
        room.core.policy = policy_of(policy)
    room.forward(HostForwarder() if forwards else None)
    return {"policy": room.core.policy.name}


@registry.method("protocol.break")
def protocol_break(agent: Agent, *, name: str) -> dict[str, str]:
    """A deliberate break (``breaks``) instead of the one in force, if any; "" mends."""
    room = _room(agent)
    breaks().mend()
    breaks().apply(name)
    room.broken = bool(name)
    return {"broken": name}


@registry.method("protocol.run")
def protocol_run(agent: Agent, *, steps: list[dict[str, Any]]) -> list[Any]:
    """Run steps; the answers end with the first that was refused."""
    return run_steps(_room(agent), steps)


@registry.method("protocol.events")
def protocol_events(agent: Agent, *, after: int = 0) -> dict[str, Any]:
    """``{version, dropped, events}`` of what happened after the event of that number; what was
    before it has arrived, and is forgotten.
    """
    events = _room(agent).core.events
    events.forget(after)
    return events.as_json()


@registry.method("protocol.clean")
def protocol_clean(agent: Agent) -> dict[str, Any]:
    """End everything in the room; ``left`` is what is still in use, ``problems`` what would not
    end.
    """
    room = _room(agent)
    problems = room.clean()
    return {"problems": problems, "left": room.backend.held()}


@registry.method("protocol.close")
def protocol_close(agent: Agent) -> dict[str, Any]:
    """End the room; its devices stay open. Answers as ``protocol.clean``."""
    room = _room(agent)
    problems = room.clean()
    left = room.backend.held()
    for member in room.backend.members.values():
        if member.vram is None:
            member.container.unmap(member.staging_at, STAGING_BYTES)
            agent.buffers.free(f"staging-{member.name}")
    room.backend.close()
    if room.broken:
        breaks().mend()
    agent.room = None
    return {"problems": problems, "left": left}
