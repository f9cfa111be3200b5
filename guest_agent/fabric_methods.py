# SPDX-License-Identifier: Apache-2.0
"""Methods ``fabric.*``: GPU models on a scale-up fabric, through the core's UAL calls.

The owner of memory gives fabric addresses out (``alloc`` to ``destroy``), the initiator puts them
into its page tables (``map``). A fabric is made of the models' links: what the owner exports over
one is either all of its video memory, by offset, or what a set of page tables translates.
"""

from __future__ import annotations

import errno

from guest_agent import (
    fabric_forwarding,  # noqa: F401  its methods are of this area
    gpu_methods,
    rpc,
)
from guest_agent.agent import check_timeout
from guest_agent.hw import gpu_commands
from guest_agent.hw.gpu import Gpu
from guest_agent.kernel_methods import registry
from guest_agent.p2p import ual
from guest_agent.p2p.addresses import on_pcie
from guest_agent.p2p.iova import IovaState
from guest_agent.p2p_device.fabric import (
    IDENTITY_SHIFT,
    ROUTE_BIT,
    Fabrics,
    Given,
    Peering,
    Port,
    Vfio,
    address_of,
    place_of,
    port_of,
    task_in,
)
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.agent import Agent

_PEER = {"name": "str", "identity": "int", "link": "int", "same_os": "bool"}


@registry.method("fabric.begin")
def fabric_begin(agent: Agent, *, title: str = "") -> dict[str, Any]:
    """Events are numbered from 1 again: whoever asks for them now knows none. ``title``: as
    ``fabric.chapter``, if a test is under way.
    """
    agent.area(Fabrics).begin()
    if title:
        agent.area(Fabrics).events.chapter("test", title)
    return {}


@registry.method("fabric.chapter")
def fabric_chapter(agent: Agent, *, title: str) -> dict[str, int]:
    """What follows is part of a test."""
    return {"number": agent.area(Fabrics).events.chapter("test", title)}


@registry.method("fabric.events")
def fabric_events(agent: Agent, *, after: int = 0) -> dict[str, Any]:
    """As ``protocol.events``: what happened after the event of that number."""
    agent.area(Fabrics).events.forget(after)
    return agent.area(Fabrics).events.as_json()


@registry.method("fabric.join")
def fabric_join(
    agent: Agent,
    *,
    engine: int,
    fabric: str,
    device: str,
    identity: int,
    video_bytes: int,
    peers: list[dict[str, Any]],
) -> dict[str, int]:
    """Put a GPU on a fabric. Each peer: ``{name, identity, link, same_os}``."""
    gpu = agent.engine(engine)
    if not isinstance(gpu, Gpu):
        raise ParameterError(f"engine: {engine} is no GPU opened by gpu.open")
    if identity >> ROUTE_BIT - IDENTITY_SHIFT:
        raise ParameterError(f"identity: {identity} does not fit below the route bit")
    port = Port(gpu, fabric, device, identity, video_bytes)
    for index, each in enumerate(peers):
        rpc.check_parts(f"peers[{index}]", each, _PEER, {})
        if each["link"] >= gpu.links:
            raise ParameterError(f"peers[{index}].link: {device} has {gpu.links}, from 0")
        port.peers[each["name"]] = Peering(port, each["name"], each["link"])
        port.links[each["identity"]] = each["link"]
        if each["same_os"]:
            port.same_os.add(each["name"])
    agent.area(Fabrics).ports[engine] = port
    agent.area(Fabrics).events.note("join", device, what=fabric, peers=len(peers))
    return {"peers": len(port.peers)}


@registry.method("fabric.alloc")
def fabric_alloc(
    agent: Agent,
    *,
    engine: int,
    peer: str,
    size_bytes: int,
    virtual: bool | None = None,
    context: list[str] | None = None,
) -> dict[str, Any]:
    """``ual_iova_alloc`` for the initiator ``peer``; in ``context``, words of ``CONTEXTS``.

    Without ``virtual`` the mode is the default: physical within one operating system.
    """
    port = port_of(agent, engine)
    peering = port.peer(peer)
    chosen = peer not in port.same_os if virtual is None else virtual
    mode = "virtual" if chosen else "physical"
    state = ual.UalState(peering, peer, port.device, virtual=chosen)
    what = f"{mode}, {size_bytes:#x} bytes"
    with agent.area(Fabrics).events.span("alloc", peering.title, what=what) as span:
        with task_in(context or [], port.device) as task:
            allocated = state.try_alloc(task, size_bytes)
        if not allocated:
            none = f"no {size_bytes:#x} bytes of addresses are free for {peer}"
            raise OSError(errno.ENOSPC, none)
        try:
            peering.use(mode)
        except OSError:
            state.free()
            raise
    number = agent.area(Fabrics).add(Given(state, peering, span.number))
    return {"state": number, "mode": mode, "iova_ranges": peering.allocated}


@registry.method("fabric.link")
def fabric_link(
    agent: Agent,
    *,
    state: int,
    physical: int,
    size_bytes: int,
    offset: int = 0,
    writable: bool = True,
) -> dict[str, Any]:
    """``ual_iova_link``: ``physical`` is an offset in the owner's video memory."""
    what = f"{size_bytes:#x} bytes at {offset:#x} → {physical:#x}"
    with agent.area(Fabrics).step(state, "link", what) as given:
        given.link(physical, offset, size_bytes, writable=writable)
    return {}


@registry.method("fabric.sync")
def fabric_sync(agent: Agent, *, state: int, size_bytes: int, offset: int = 0) -> dict[str, Any]:
    """``ual_iova_sync``."""
    what = f"{size_bytes:#x} bytes at {offset:#x}"
    with agent.area(Fabrics).step(state, "sync", what) as given:
        given.sync(offset, size_bytes)
    return {}


@registry.method("fabric.unlink")
def fabric_unlink(agent: Agent, *, state: int, size_bytes: int, offset: int = 0) -> dict[str, Any]:
    """``ual_iova_unlink``; from the answer on the initiator faults there."""
    what = f"{size_bytes:#x} bytes at {offset:#x}"
    with agent.area(Fabrics).step(state, "unlink", what) as given:
        given.unlink(offset, size_bytes)
    return {}


@registry.method("fabric.address")
def fabric_address(agent: Agent, *, state: int, offset: int = 0) -> dict[str, Any]:
    """The address for the initiator, and what its page tables have if it is a physical one."""
    found = agent.area(Fabrics).state(state).address(offset)
    answer = {"kind": "fabric", **vars(found)}
    entry = found.page_table_entry(ROUTE_BIT) if found.physical else None
    return {"address": answer, "entry": entry, "route_bit": ROUTE_BIT}


@registry.method("fabric.free")
def fabric_free(agent: Agent, *, state: int) -> dict[str, Any]:
    """``ual_iova_free``."""
    with agent.area(Fabrics).step(state, "free") as given:
        given.free()
    agent.area(Fabrics).drop(state)
    return {}


@registry.method("fabric.destroy")
def fabric_destroy(agent: Agent, *, state: int, mapped_bytes: int) -> dict[str, Any]:
    """``ual_iova_destroy``."""
    with agent.area(Fabrics).step(state, "destroy", f"{mapped_bytes:#x} bytes") as given:
        given.destroy(mapped_bytes)
    agent.area(Fabrics).drop(state)
    return {}


@registry.method("fabric.close")
def fabric_close(agent: Agent, *, engine: int, peer: str) -> dict[str, Any]:
    """Export nothing to the peer any more. :raises OSError: EBUSY: it has addresses."""
    peering = port_of(agent, engine).peer(peer)
    with agent.area(Fabrics).events.span("close", peering.title):
        peering.use("closed")
    return {}


@registry.method("fabric.map")
def fabric_map(
    agent: Agent,
    *,
    engine: int,
    owner: str,
    address: dict[str, Any],
    virtual: int,
    size_bytes: int,
) -> dict[str, int]:
    """The initiator's part: its page tables lead from ``virtual`` to the owner's memory."""
    port = port_of(agent, engine)
    found = address_of(address)
    what = f"{virtual:#x} → {size_bytes:#x} bytes of {owner}"
    with agent.area(Fabrics).events.span("map", port.device, what=what, address=str(found)):
        aperture, number = place_of(port, owner, found)
        port.gpu.space(0).map(virtual, size_bytes, number, aperture)
    return {"link": aperture >> 4}


@registry.method("fabric.unmap")
def fabric_unmap(agent: Agent, *, engine: int, virtual: int, size_bytes: int) -> dict[str, int]:
    """Undo :func:`fabric_map`, and have the GPU forget it."""
    port = port_of(agent, engine)
    what = f"{size_bytes:#x} bytes at {virtual:#x}"
    with agent.area(Fabrics).events.span("unmap", port.device, what=what):
        done = port.gpu.space(0).unmap(virtual, size_bytes)
        port.gpu.invalidate(None)
    return {"unmapped_bytes": done}


@registry.method("fabric.on_pcie")
def fabric_on_pcie(
    agent: Agent, *, engine: int, address: dict[str, Any], bits: int = 64
) -> dict[str, int]:
    """The number that the GPU may put on PCIe. :raises AddressError: of another kind or user."""
    return {"value": on_pcie(address_of(address), port_of(agent, engine).device, bits)}


@registry.method("fabric.dma_copy")
def fabric_dma_copy(
    agent: Agent,
    *,
    engine: int,
    container: int,
    source: dict[str, Any],
    iova: int,
    target_iova: int,
    size_bytes: int,
    context: list[str] | None = None,
    timeout_s: float = 10.0,
) -> dict[str, Any]:
    """``dma_iova_try_alloc``, link and sync in ``context``, at ``iova``; then the GPU copies from
    there to ``target_iova``, and all is undone.
    """
    check_timeout(timeout_s)
    gpu = agent.engine(engine)
    table = Vfio(agent.vfio(container), agent.region("source", source), iova)
    device = port_of(agent, engine).device
    state = IovaState(table, device)
    what = f"{size_bytes:#x} bytes, {iova:#x} → {target_iova:#x} by PCIe"
    with agent.area(Fabrics).events.span("copy", device, what=what):
        with task_in(context or [], "dma"):  # the kernel allows all of it anywhere
            allocated = state.try_alloc(0, size_bytes)
            if not allocated:
                raise OSError(errno.ENOSPC, f"{size_bytes:#x} bytes at {iova:#x}")
            state.link(source.get("offset", 0), 0, size_bytes)
            state.sync(0, size_bytes)
        try:
            return gpu.copy(iova, target_iova, size_bytes, timeout_s)
        finally:
            state.destroy(size_bytes)


@registry.method("fabric.submit")
def fabric_submit(agent: Agent, *, engine: int, commands: list[dict[str, Any]]) -> dict[str, Any]:
    """``gpu.submit``, as an event; where it ended, if it did not get through, is a fault."""
    device = port_of(agent, engine).device
    with agent.area(Fabrics).events.span("copy", device) as span:
        answer: dict[str, Any] = gpu_methods.gpu_submit(agent, engine=engine, commands=commands)
        span.details["what"] = ", ".join(map(gpu_commands.said, commands))
    if not answer["completed"]:
        status = answer["status"]
        why = f"{status['cause']} at {status.get('address', 0):#x}"
        agent.area(Fabrics).events.note("fault", device, span.number, why=why)
    return answer


@registry.method("fabric.watch_window")
def fabric_watch_window(agent: Agent, *, container: int, device: str) -> dict[str, Any]:
    """Have the kernel say when it wants a window back that VFIO holds."""
    agent.vfio_device(container, device).watch_request()
    agent.area(Fabrics).events.note("watch", f"window {device}")
    return {}


@registry.method("fabric.window_wanted")
def fabric_window_wanted(
    agent: Agent, *, container: int, device: str, timeout_s: float
) -> dict[str, bool]:
    """Whether it does, within ``timeout_s``. Until it is let go of, it works on."""
    check_timeout(timeout_s)
    wanted = agent.vfio_device(container, device).requested(timeout_s)
    if wanted:
        agent.area(Fabrics).events.note("wanted", f"window {device}")
    return {"wanted": wanted}
