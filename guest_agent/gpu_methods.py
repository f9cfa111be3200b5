# SPDX-License-Identifier: Apache-2.0
"""Methods ``gpu.*``: everything the GPU model can do; loaded when one is first called.

An engine of kind ``model`` becomes a whole GPU by ``gpu.open`` and keeps its number, so that
``engine.copy`` and its like go on working. Places in commands: :mod:`guest_agent.hw.gpu_commands`.
"""

from __future__ import annotations

from guest_agent import rpc
from guest_agent.agent import check_timeout
from guest_agent.hw import gpu_commands
from guest_agent.hw.gpu import Gpu
from guest_agent.hw.model import Model
from guest_agent.kernel_methods import registry
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.agent import Agent

MAX_TOUCHES = 10_000
TOUCHED = 1 << 46  # where first touches happen in the virtual space, unless it is said
_PAGES = {"virtual": "int", "size_bytes": "int", "backing": "dict[str, Any]"}
_PAGES_MAY = {"page_bytes": "int", "writable": "bool", "replace": "bool", "space": "int"}


def _gpu(agent: Agent, number: int) -> Gpu:
    found = agent.engine(number)
    if not isinstance(found, Gpu):
        raise ParameterError(f"engine: {number} is no GPU opened by gpu.open")
    return found


def _pages(name: str, pages: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``PageTables.map``. :raises ParameterError: what is wrong, by name and part."""
    rpc.check_parts(name, pages, _PAGES, _PAGES_MAY)
    aperture = gpu_commands.place(f"{name}.backing", pages["backing"])
    if aperture & 0xF == gpu_commands.SPACES["virtual"]:
        raise ParameterError(f"{name}.backing.space: a page is not itself virtual")
    return {
        "virtual": pages["virtual"],
        "size_bytes": pages["size_bytes"],
        "address": pages["backing"]["address"],
        "aperture": aperture,
        "page_bytes": pages.get("page_bytes", 4096),
        "writable": pages.get("writable", True),
        "replace": pages.get("replace", False),
    }


def _map(gpu: Gpu, pages: list[dict[str, Any]]) -> None:
    for index, each in enumerate(pages):
        arguments = _pages(f"pages[{index}]", each)
        gpu.space(each.get("space", 0)).map(**arguments)


def check_touches(count: int, backing_bytes: int, page_bytes: int) -> None:
    """:raises ParameterError: not a number of first touches, or memory not of whole pages."""
    if not 1 <= count <= MAX_TOUCHES:
        raise ParameterError(f"count: 1 to {MAX_TOUCHES}, not {count}")
    if backing_bytes == 0 or not page_bytes or backing_bytes % page_bytes:
        raise ParameterError(f"backing_bytes: {backing_bytes} is no multiple of {page_bytes}")


@registry.method("gpu.open")
def gpu_open(
    agent: Agent, *, engine: int, video: dict[str, Any], replayable: bool = True
) -> dict[str, Any]:
    """``video``: ``{"bar", "index", "offset", "size_bytes"}``, video memory for its own use."""
    old = agent.engine(engine)
    if type(old) is not Model:
        raise ParameterError(f"engine: {engine} is no engine of kind 'model'")
    parts = {"bar": "str", "index": "int", "offset": "int", "size_bytes": "int"}
    rpc.check_parts("video", video, parts, {})
    memory = agent.region("video", {"bar": video["bar"], "index": video["index"]})
    gpu = Gpu(
        old.device,
        old.scratch,
        memory,
        video["offset"],
        video["size_bytes"],
        replayable=replayable,
    )
    gpu.open()
    agent.engines[engine] = gpu
    return {"links": gpu.links, "video_bytes": memory.size_bytes}


@registry.method("gpu.map")
def gpu_map(agent: Agent, *, engine: int, pages: list[dict[str, Any]]) -> dict[str, Any]:
    """Each: ``{virtual, size_bytes, backing}`` and perhaps ``page_bytes`` (4096 or 2097152),
    ``writable``, ``replace``, ``space``.
    """
    _map(_gpu(agent, engine), pages)
    return {}


@registry.method("gpu.unmap")
def gpu_unmap(
    agent: Agent, *, engine: int, virtual: int, size_bytes: int, space: int = 0
) -> dict[str, int]:
    """Takes pages out of the tables; the device may know them until ``gpu.invalidate``."""
    return {"unmapped_bytes": _gpu(agent, engine).space(space).unmap(virtual, size_bytes)}


@registry.method("gpu.invalidate")
def gpu_invalidate(agent: Agent, *, engine: int, virtual: int | None = None) -> dict[str, Any]:
    """The page at ``virtual``, or all."""
    if virtual is not None:
        gpu_commands.fits("virtual", virtual, 64)
    _gpu(agent, engine).invalidate(virtual)
    return {}


@registry.method("gpu.space")
def gpu_space(agent: Agent, *, engine: int) -> dict[str, int]:
    """One more address space, for a link to export."""
    return {"space": _gpu(agent, engine).add_space()}


@registry.method("gpu.drop_space")
def gpu_drop_space(agent: Agent, *, engine: int, space: int) -> dict[str, Any]:
    """Gives its tables back; they are used again after an invalidation of all."""
    _gpu(agent, engine).drop_space(space)
    return {}


@registry.method("gpu.submit")
def gpu_submit(
    agent: Agent,
    *,
    engine: int,
    commands: list[dict[str, Any]],
    by: str = "poll",
    wait: bool = True,
    timeout_s: float = 10.0,
) -> dict[str, Any]:
    """Answers as ``gpu.wait``, or the number of the batch if nobody shall wait for it now."""
    check_timeout(timeout_s)
    gpu = _gpu(agent, engine)
    encoded = [gpu_commands.encode(f"commands[{i}]", each) for i, each in enumerate(commands)]
    batch = gpu.submit(encoded, by)
    return gpu.wait(batch, timeout_s, by) if wait else {"batch": batch}


@registry.method("gpu.wait")
def gpu_wait(
    agent: Agent, *, engine: int, batch: int, timeout_s: float = 10.0, by: str = "poll"
) -> dict[str, Any]:
    """``{batch, completed, ended, elapsed_ns, failed, status}``: see ``Batches.wait``."""
    check_timeout(timeout_s)
    return _gpu(agent, engine).wait(batch, timeout_s, by)


@registry.method("gpu.reset")
def gpu_reset(agent: Agent, *, engine: int) -> dict[str, Any]:
    """Stops what is under way; page tables and links stay."""
    _gpu(agent, engine).reset_engine()
    return {}


@registry.method("gpu.faults")
def gpu_faults(
    agent: Agent, *, engine: int, timeout_s: float = 0.0, by: str = "poll"
) -> dict[str, Any]:
    """Waits for the first at most so long."""
    check_timeout(timeout_s)
    return _gpu(agent, engine).wait_faults(timeout_s, by)


@registry.method("gpu.resolve")
def gpu_resolve(
    agent: Agent,
    *,
    engine: int,
    pages: list[dict[str, Any]] | None = None,
    cancel: bool = False,
) -> dict[str, Any]:
    """Map pages as ``gpu.map`` does, and let what waits try again; or fail it."""
    gpu = _gpu(agent, engine)
    _map(gpu, pages or [])
    gpu.replay(cancel=cancel)
    return {}


@registry.method("gpu.serve")
def gpu_serve(
    agent: Agent,
    *,
    engine: int,
    batch: int,
    pages: list[dict[str, Any]],
    timeout_s: float = 10.0,
    by: str = "poll",
) -> dict[str, Any]:
    """Answer a batch's page faults until it ends, from ``pages`` as ``gpu.map`` takes them, each
    mapped when it is touched; others are cancelled. As ``gpu.wait``, and how many.
    """
    check_timeout(timeout_s)
    gpu = _gpu(agent, engine)
    windows = [_pages(f"pages[{index}]", each) for index, each in enumerate(pages)]
    return gpu.serve(batch, windows, timeout_s, by)


@registry.method("gpu.fault_latency")
def gpu_fault_latency(
    agent: Agent,
    *,
    engine: int,
    count: int,
    backing: dict[str, Any],
    backing_bytes: int,
    page_bytes: int = 4096,
    access: str = "write",
    by: str = "poll",
    virtual: int = TOUCHED,
    timeout_s: float = 60.0,
) -> dict[str, Any]:
    """``count`` first touches: nanoseconds from doorbell to record seen, to replay, to done."""
    check_timeout(timeout_s)
    gpu = _gpu(agent, engine)
    check_touches(count, backing_bytes, page_bytes)
    if access not in ("read", "write"):
        raise ParameterError(f"access: {access!r} is neither read nor write")
    samples = gpu.first_touches(
        virtual=virtual,
        count=count,
        page_bytes=page_bytes,
        address=backing.get("address", 0),
        backing_bytes=backing_bytes,
        aperture=gpu_commands.place("backing", backing),
        access=access,
        by=by,
        timeout_s=timeout_s,
    )
    return {"count": count, "page_bytes": page_bytes, "by": by, **samples}


@registry.method("gpu.links")
def gpu_links(agent: Agent, *, engine: int) -> list[dict[str, Any]]:
    """All links: state, width, what this end exports and how much the peer does."""
    gpu = _gpu(agent, engine)
    return [gpu.link(number) for number in range(gpu.links)]


@registry.method("gpu.link_enable")
def gpu_link_enable(agent: Agent, *, engine: int, link: int, on: bool) -> dict[str, Any]:
    """Takes this end up or down; answers the link as it is then."""
    gpu = _gpu(agent, engine)
    gpu.enable_link(link, on=on)
    return gpu.link(link)


@registry.method("gpu.link_export")
def gpu_link_export(
    agent: Agent,
    *,
    engine: int,
    link: int,
    mode: str,
    offset: int = 0,
    space: int = 0,
    size_bytes: int = 0,
    timeout_s: float = 5.0,
) -> dict[str, bool]:
    """``closed``; ``physical``: a window of video memory from ``offset``; ``virtual``: what
    ``space`` translates. ``synchronized``: the peer has taken note.
    """
    check_timeout(timeout_s)
    start = space if mode == "virtual" else gpu_commands.fits("offset", offset, 64)
    gpu_commands.fits("size_bytes", size_bytes, 64)
    done = _gpu(agent, engine).export(link, mode, start, size_bytes, timeout_s)
    return {"synchronized": done}


@registry.method("gpu.link_wait")
def gpu_link_wait(
    agent: Agent, *, engine: int, link: int, state: str, timeout_s: float = 5.0, by: str = "poll"
) -> dict[str, bool]:
    """``reached``: the link is ``up`` or ``down``, as asked."""
    check_timeout(timeout_s)
    return {"reached": _gpu(agent, engine).wait_link(link, state, timeout_s, by)}
