# SPDX-License-Identifier: Apache-2.0
"""Methods ``fabric.*``: GPU models on a scale-up fabric, through the core's UAL calls.

The owner of memory gives fabric addresses out (``alloc`` to ``destroy``), the initiator puts them
into its page tables (``map``). A fabric is made of the models' links: what the owner exports over
one is either all of its video memory, by offset, or what a set of page tables translates.
"""

from __future__ import annotations

import contextlib
import errno

from guest_agent import rpc
from guest_agent.agent import check_timeout
from guest_agent.hw import model_registers as hw
from guest_agent.hw.gpu import Gpu
from guest_agent.kernel_methods import registry
from guest_agent.p2p import ual
from guest_agent.p2p.addresses import DmaAddress, FabricAddress, on_fabric, on_pcie
from guest_agent.p2p.iova import IovaState
from guest_agent.p2p.resv import Reservation, locked
from guest_agent.p2p.rules import Task
from guest_agent.p2p_device.fabric import (
    IDENTITY_SHIFT,
    ROUTE_BIT,
    Fabrics,
    Peering,
    Port,
    Vfio,
)
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from guest_agent.agent import Agent
    from guest_agent.p2p.addresses import Address

VIRTUAL_PORT = "fabric"
CONTEXTS = ("reclaim", "notifier lock", "reservation")
_PEER = {"name": "str", "identity": "int", "link": "int", "same_os": "bool"}
_ADDRESS = {"kind": "str", "value": "int", "user": "str"}
_ADDRESS_MAY = {"fabric": "str", "physical": "bool"}


def _fabrics(agent: Agent) -> Fabrics:
    found = agent.area_state.setdefault("fabric", Fabrics())
    if not isinstance(found, Fabrics):
        raise TypeError("area_state: fabric")
    return found


def _port(agent: Agent, engine: int) -> Port:
    port = _fabrics(agent).ports.get(engine)
    if port is None or agent.engine(engine) is not port.gpu:
        raise ParameterError(f"engine: {engine} has not joined a fabric (fabric.join)")
    return port


def _state(agent: Agent, number: int) -> ual.UalState:
    states = _fabrics(agent).states
    if number not in states:
        raise ParameterError(f"state: there is no {number}")
    return states[number][0]


@contextlib.contextmanager
def _task(name: str, context: list[str]) -> Iterator[Task]:
    task = Task(name)
    with contextlib.ExitStack() as stack:
        for word in context:
            if word == "reclaim":
                stack.enter_context(task.reclaiming())
            elif word == "notifier lock":
                stack.enter_context(task.notifier_lock())
            elif word == "reservation":
                stack.enter_context(locked(task, Reservation(f"a buffer of {name}")))
            else:
                raise ParameterError(f"context: {word!r} is none of {', '.join(CONTEXTS)}")
        yield task


def _address(value: dict[str, Any]) -> Address:
    rpc.check_parts("address", value, _ADDRESS, _ADDRESS_MAY)
    if value["kind"] == "dma":
        return DmaAddress(value["value"], value["user"])
    if value["kind"] == "fabric" and {"fabric", "physical"} <= value.keys():
        return FabricAddress(value["value"], value["user"], value["fabric"], value["physical"])
    raise ParameterError("address: of kind 'dma', or 'fabric' with 'fabric' and 'physical'")


def _place(port: Port, owner: str, address: Address) -> tuple[int, int]:
    """The aperture and the address in it that a page table entry of the model has."""
    number = on_fabric(address, port.device, port.fabric)
    if not isinstance(address, FabricAddress) or not address.physical:
        return hw.APERTURE_LINK | port.peer(owner).link << 4, number
    entry = address.page_table_entry(ROUTE_BIT)
    identity = (entry & (1 << ROUTE_BIT) - 1) >> IDENTITY_SHIFT
    if identity not in port.links:
        raise OSError(errno.ENXIO, f"{address}: no link of {port.device} leads to {identity}")
    offset = entry & (1 << IDENTITY_SHIFT) - 1
    return hw.APERTURE_LINK | port.links[identity] << 4, offset


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
    _fabrics(agent).ports[engine] = port
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
    port = _port(agent, engine)
    peering = port.peer(peer)
    chosen = peer not in port.same_os if virtual is None else virtual
    mode = "virtual" if chosen else "physical"
    state = ual.UalState(peering, peer, port.device, virtual=chosen)
    with _task(port.device, context or []) as task:
        allocated = state.try_alloc(task, size_bytes)
    if not allocated:
        raise OSError(errno.ENOSPC, f"no {size_bytes:#x} bytes of addresses are free for {peer}")
    try:
        peering.use(mode)
    except OSError:
        state.free()
        raise
    number = _fabrics(agent).add(state, peering)
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
    _state(agent, state).link(physical, offset, size_bytes, writable=writable)
    return {}


@registry.method("fabric.sync")
def fabric_sync(agent: Agent, *, state: int, size_bytes: int, offset: int = 0) -> dict[str, Any]:
    """``ual_iova_sync``."""
    _state(agent, state).sync(offset, size_bytes)
    return {}


@registry.method("fabric.unlink")
def fabric_unlink(agent: Agent, *, state: int, size_bytes: int, offset: int = 0) -> dict[str, Any]:
    """``ual_iova_unlink``; from the answer on the initiator faults there."""
    _state(agent, state).unlink(offset, size_bytes)
    return {}


@registry.method("fabric.address")
def fabric_address(agent: Agent, *, state: int, offset: int = 0) -> dict[str, Any]:
    """The address for the initiator, and what its page tables have if it is a physical one."""
    found = _state(agent, state).address(offset)
    answer = {"kind": "fabric", **vars(found)}
    entry = found.page_table_entry(ROUTE_BIT) if found.physical else None
    return {"address": answer, "entry": entry, "route_bit": ROUTE_BIT}


@registry.method("fabric.free")
def fabric_free(agent: Agent, *, state: int) -> dict[str, Any]:
    """``ual_iova_free``."""
    _state(agent, state).free()
    _fabrics(agent).drop(state)
    return {}


@registry.method("fabric.destroy")
def fabric_destroy(agent: Agent, *, state: int, mapped_bytes: int) -> dict[str, Any]:
    """``ual_iova_destroy``."""
    _state(agent, state).destroy(mapped_bytes)
    _fabrics(agent).drop(state)
    return {}


@registry.method("fabric.close")
def fabric_close(agent: Agent, *, engine: int, peer: str) -> dict[str, Any]:
    """Export nothing to the peer any more. :raises OSError: EBUSY: it has addresses."""
    _port(agent, engine).peer(peer).use("closed")
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
    port = _port(agent, engine)
    aperture, number = _place(port, owner, _address(address))
    port.gpu.space(0).map(virtual, size_bytes, number, aperture)
    return {"link": aperture >> 4}


@registry.method("fabric.unmap")
def fabric_unmap(agent: Agent, *, engine: int, virtual: int, size_bytes: int) -> dict[str, int]:
    """Undo :func:`fabric_map`, and have the GPU forget it."""
    gpu = _port(agent, engine).gpu
    done = gpu.space(0).unmap(virtual, size_bytes)
    gpu.invalidate(None)
    return {"unmapped_bytes": done}


@registry.method("fabric.on_pcie")
def fabric_on_pcie(
    agent: Agent, *, engine: int, address: dict[str, Any], bits: int = 64
) -> dict[str, int]:
    """The number that the GPU may put on PCIe. :raises AddressError: of another kind or user."""
    return {"value": on_pcie(_address(address), _port(agent, engine).device, bits)}


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
    state = IovaState(table, _port(agent, engine).device)
    with _task("dma", context or []):  # the kernel allows all of it anywhere
        allocated = state.try_alloc(0, size_bytes)
        if not allocated:
            raise OSError(errno.ENOSPC, f"{size_bytes:#x} bytes at {iova:#x}")
        state.link(source.get("offset", 0), 0, size_bytes)
        state.sync(0, size_bytes)
    try:
        return gpu.copy(iova, target_iova, size_bytes, timeout_s)
    finally:
        state.destroy(size_bytes)


@registry.method("fabric.watch_window")
def fabric_watch_window(agent: Agent, *, container: int, device: str) -> dict[str, Any]:
    """Have the kernel say when it wants a window back that VFIO holds."""
    agent.vfio_device(container, device).watch_request()
    return {}


@registry.method("fabric.window_wanted")
def fabric_window_wanted(
    agent: Agent, *, container: int, device: str, timeout_s: float
) -> dict[str, bool]:
    """Whether it does, within ``timeout_s``. Until it is let go of, it works on."""
    check_timeout(timeout_s)
    return {"wanted": agent.vfio_device(container, device).requested(timeout_s)}


@registry.method("fabric.attach")
def fabric_attach(
    agent: Agent, *, engine: int, owner: str, buffer: str, forwards: bool = True
) -> dict[str, Any]:
    """Attach to a ``buffer`` of another node's GPU by a virtual interconnect.

    What that leads to the host knows, which is asked unless nothing ``forwards`` the question.
    :raises NoPathError: EINVAL: it cannot be asked. :raises AbortedError: EAGAIN: it is asked;
    otherwise its own errno and reason.
    """
    from guest_agent.p2p import interconnect, negotiation, policies, topology  # noqa: PLC0415

    port = _port(agent, engine)
    near = interconnect.Facts(hops=1)
    devices = {owner: near, port.device: near}
    joined = topology.TableTopology({(owner, port.device): near}, devices)
    kind = interconnect.Kind.VIRTUAL
    ours = interconnect.Offer(kind, port.device, VIRTUAL_PORT)
    theirs = interconnect.Offer(kind, owner, buffer)
    forwarder = port.forwarder if forwards else None
    policy = policies.BEST_QUALITY
    outcome = negotiation.negotiate(joined, [theirs], [ours], policy, forwarder=forwarder)
    question = (f"{owner}:{buffer}", f"{port.device}:{VIRTUAL_PORT}")
    return {"path": str(outcome.path), "address": port.given[question]}


@registry.method("fabric.questions")
def fabric_questions(agent: Agent, *, engine: int) -> dict[str, Any]:
    """What the host is asked: pairs of ends, the owner's first."""
    return {"questions": [list(each) for each in _port(agent, engine).forwarder.questions]}


@registry.method("fabric.answer")
def fabric_answer(
    agent: Agent,
    *,
    engine: int,
    question: list[str],
    errno: int = 0,
    why: str = "",
    address: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The host's answer: an address of the fabric, or an errno and why."""
    port = _port(agent, engine)
    if len(question) != 2 or tuple(question) not in port.forwarder.questions:
        raise ParameterError(f"question: {question} was not asked")
    pair = (question[0], question[1])
    if not errno:
        if address is None:
            raise ParameterError("address: an answer without an errno has one")
        _address(address)
        port.given[pair] = address
    from guest_agent.p2p.report import Refusal  # noqa: PLC0415  seldom

    port.forwarder.questions.remove(pair)
    port.forwarder.answers[pair] = Refusal(errno, why) if errno else None
    return {}


@registry.method("fabric.forget")
def fabric_forget(agent: Agent, *, engine: int) -> dict[str, Any]:
    """Forget questions and answers: what was given may be taken back any time."""
    _port(agent, engine).forget()
    return {}
