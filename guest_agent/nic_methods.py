# SPDX-License-Identifier: Apache-2.0
"""Methods ``nic.*``: everything the NIC model can do; loaded when one is first called.

An engine of kind ``model-nic`` becomes a whole NIC by ``nic.open`` and keeps its number.
"""

from __future__ import annotations

from guest_agent import rpc
from guest_agent.agent import check_timeout
from guest_agent.gpu_methods import check_touches
from guest_agent.hw import model_registers as hw
from guest_agent.hw.engine import PAGE_BYTES
from guest_agent.hw.gpu_commands import fits
from guest_agent.hw.model import ModelNic
from guest_agent.hw.nic import ENTRY_BYTES, RIGHTS, Nic, NicRegion
from guest_agent.kernel_methods import registry
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.agent import Agent


def _nic(agent: Agent, number: int) -> Nic:
    found = agent.engine(number)
    if not isinstance(found, Nic):
        raise ParameterError(f"engine: {number} is no NIC opened by nic.open")
    return found


@registry.method("nic.open")
def nic_open(agent: Agent, *, engine: int) -> dict[str, int]:
    """``address``: its number on the network; ``regions``: as many slots, of which 0 is taken."""
    old = agent.engine(engine)
    if type(old) is not ModelNic:
        raise ParameterError(f"engine: {engine} is no engine of kind 'model-nic'")
    nic = Nic(old.device, old.scratch)
    nic.open()
    agent.engines[engine] = nic
    return {"address": nic.address, "regions": nic.slots}


@registry.method("nic.region")
def nic_region(
    agent: Agent,
    *,
    engine: int,
    index: int,
    base: int,
    size_bytes: int,
    iova: int,
    rights: list[str],
    table: dict[str, Any] | None = None,
) -> dict[str, int]:
    """``rights``: local_write, remote_read, remote_write. With ``table``, a memory that ``iova`` is
    the address of, the region is on demand: the table is emptied, ``nic.pages`` fills it.
    """
    flags = hw.REGION_FLAG_VALID
    for right in rights:
        if right not in RIGHTS:
            raise ParameterError(f"rights: {right!r} is none of {', '.join(RIGHTS)}")
        flags |= RIGHTS[right]
    for name, value in (("base", base), ("size_bytes", size_bytes), ("iova", iova)):
        fits(name, value, 64)
    memory, offset = None, 0
    if table is not None:
        memory, offset = agent.region("table", table), table.get("offset", 0)
        if offset % ENTRY_BYTES:
            raise ParameterError("table.offset: no multiple of 8")
        pages = -(-size_bytes // PAGE_BYTES)
        memory.write(offset, bytes(pages * ENTRY_BYTES))
        flags |= hw.REGION_FLAG_ON_DEMAND
    region = NicRegion(base, size_bytes, iova, flags, memory, offset)
    return {"key": _nic(agent, engine).add_region(index, region)}


@registry.method("nic.remove")
def nic_remove(agent: Agent, *, engine: int, index: int) -> dict[str, Any]:
    """The region is no more, and its key worth nothing."""
    _nic(agent, engine).remove_region(index)
    return {}


@registry.method("nic.keys")
def nic_keys(agent: Agent, *, engine: int) -> dict[str, int]:
    """Key by index; a request that failed has reset the NIC, and every key is new."""
    return _nic(agent, engine).keys()


@registry.method("nic.pages")
def nic_pages(
    agent: Agent,
    *,
    engine: int,
    index: int,
    page: int,
    count: int = 1,
    iova: int | None = None,
    writable: bool = True,
) -> dict[str, Any]:
    """Pages of an on-demand region are at ``iova``, or (without) nowhere any more."""
    _set_pages(
        _nic(agent, engine).region(index),
        {"page": page, "count": count, "writable": writable}
        | ({} if iova is None else {"iova": iova}),
    )
    return {}


def _set_pages(region: NicRegion, pages: dict[str, Any]) -> None:
    count = pages.get("count", 1)
    if "iova" in pages:
        iova = fits("iova", pages["iova"], 64)
        region.set_pages(pages["page"], count, iova, writable=pages.get("writable", True))
    else:
        region.clear_pages(pages["page"], count)


@registry.method("nic.invalidate")
def nic_invalidate(agent: Agent, *, engine: int, index: int) -> dict[str, Any]:
    """The NIC forgets which pages of that region it knew."""
    _nic(agent, engine).invalidate(index)
    return {}


@registry.method("nic.submit")
def nic_submit(
    agent: Agent,
    *,
    engine: int,
    requests: list[dict[str, Any]],
    by: str = "poll",
    wait: bool = True,
    timeout_s: float = 10.0,
) -> dict[str, Any]:
    """Answers as ``nic.wait``, or the number of the batch if nobody shall wait for it now."""
    check_timeout(timeout_s)
    nic = _nic(agent, engine)
    batch = nic.submit([nic.encode(f"requests[{i}]", r) for i, r in enumerate(requests)], by)
    return nic.wait(batch, timeout_s, by) if wait else {"batch": batch}


@registry.method("nic.wait")
def nic_wait(
    agent: Agent, *, engine: int, batch: int, timeout_s: float = 10.0, by: str = "poll"
) -> dict[str, Any]:
    """As ``gpu.wait``."""
    check_timeout(timeout_s)
    return _nic(agent, engine).wait(batch, timeout_s, by)


@registry.method("nic.reset")
def nic_reset(agent: Agent, *, engine: int) -> dict[str, int]:
    """Stops what is under way; answers as ``nic.keys``."""
    nic = _nic(agent, engine)
    nic.reset_engine()
    return nic.keys()


@registry.method("nic.faults")
def nic_faults(
    agent: Agent, *, engine: int, timeout_s: float = 0.0, by: str = "poll"
) -> dict[str, Any]:
    """Waits for the first at most so long; ``command`` of a record is the region's key."""
    check_timeout(timeout_s)
    return _nic(agent, engine).wait_faults(timeout_s, by)


@registry.method("nic.resolve")
def nic_resolve(
    agent: Agent,
    *,
    engine: int,
    pages: list[dict[str, Any]] | None = None,
    cancel: bool = False,
) -> dict[str, Any]:
    """Each page: ``{index, page, iova}`` and perhaps ``count`` and ``writable``; then replay."""
    nic = _nic(agent, engine)
    for number, each in enumerate(pages or []):
        parts = {"index": "int", "page": "int", "iova": "int"}
        rpc.check_parts(f"pages[{number}]", each, parts, {"count": "int", "writable": "bool"})
        _set_pages(nic.region(each["index"]), each)
    nic.replay(cancel=cancel)
    return {}


@registry.method("nic.fault_latency")
def nic_fault_latency(
    agent: Agent,
    *,
    engine: int,
    index: int,
    count: int,
    iova: int,
    backing_bytes: int,
    by: str = "poll",
    timeout_s: float = 60.0,
) -> dict[str, Any]:
    """As ``gpu.fault_latency``, by writes in loopback to an on-demand region."""
    check_timeout(timeout_s)
    check_touches(count, backing_bytes, PAGE_BYTES)
    samples = _nic(agent, engine).first_touches(
        index=index,
        count=count,
        iova=iova,
        backing_bytes=backing_bytes,
        by=by,
        timeout_s=timeout_s,
    )
    return {"count": count, "page_bytes": PAGE_BYTES, "by": by, **samples}
