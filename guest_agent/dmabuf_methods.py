# SPDX-License-Identifier: Apache-2.0
"""The agent's methods around dma-bufs: exported by a module of ours or by VFIO, and imported."""

from __future__ import annotations

from guest_agent.kernel_methods import registry
from guest_agent.p2p.command_file import BOUNCE_BYTES
from guest_agent.p2p.dmabuf import DmaBufs
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.agent import Agent

_PAGE_BYTES = 4096


@registry.method("dmabuf.bind")
def _bind(agent: Agent, *, device: str, module: str) -> dict[str, Any]:
    """Let ``dmabuf_exporter`` or ``dmabuf_importer`` drive a function."""
    agent.area(DmaBufs).bind(device, module)
    return {}


@registry.method("dmabuf.unbind")
def _unbind(agent: Agent, *, device: str) -> dict[str, Any]:
    agent.area(DmaBufs).unbind(device)
    return {}


@registry.method("dmabuf.release")
def _release(agent: Agent) -> dict[str, Any]:
    """Unmap and detach every import, close every buffer, give every function back."""
    agent.end_area(DmaBufs)
    return {}


@registry.method("dmabuf.export")
def _export(
    agent: Agent,
    *,
    name: str,
    device: str,
    bar: int,
    mode: str,
    ranges: list[dict[str, Any]],
    revocable: bool = False,
    chunk_bytes: int = 0,
    by_child: bool = False,
) -> dict[str, Any]:
    """``ranges``: ``{offset, size_bytes}`` in the BAR, one after the other in the buffer.

    ``chunk_bytes``: of mode ``no-check``, how much is mapped at once; 0: each range.
    """
    pieces = " ".join(f"{each['offset']}:{each['size_bytes']}" for each in ranges)
    words = f"{device} {bar} {mode} {revocable:d} {chunk_bytes} {pieces}"
    return agent.area(DmaBufs).export(name, words, by_child=by_child)


@registry.method("dmabuf.export_vfio")
def _export_vfio(
    agent: Agent,
    *,
    name: str,
    container: int,
    device: str,
    bar: int,
    ranges: list[dict[str, Any]],
    flags: int = 0,
) -> dict[str, Any]:
    """By ``VFIO_DEVICE_FEATURE_DMA_BUF`` of the kernel's vfio-pci, of an open container."""
    function = agent.vfio_device(container, device)
    try:
        pieces = [(each["offset"], each["size_bytes"]) for each in ranges]
        fd = function.export(bar, pieces, flags)
    except OSError as error:
        return {"errno": error.errno}
    agent.area(DmaBufs).adopt(name, fd)
    return {"errno": 0}


@registry.method("dmabuf.vfio_decode")
def _vfio_decode(agent: Agent, *, container: int, device: str, on: bool) -> dict[str, Any]:
    """Turn memory decoding of a VFIO device on or off, in its command register."""
    agent.vfio_device(container, device).decode(on)
    return {}


@registry.method("dmabuf.vfio_reset")
def _vfio_reset(agent: Agent, *, container: int, device: str) -> dict[str, bool]:
    return {"reset": agent.vfio_device(container, device).reset()}


@registry.method("dmabuf.close")
def _close(agent: Agent, *, name: str) -> dict[str, Any]:
    agent.area(DmaBufs).close_buffer(name)
    return {}


@registry.method("dmabuf.mmap")
def _mmap(agent: Agent, *, name: str, size_bytes: int) -> dict[str, Any]:
    """``{errno, hex}``: what the CPU reads through a mapping of the dma-buf itself."""
    return agent.area(DmaBufs).mmap(name, size_bytes)


@registry.method("dmabuf.revoke")
def _revoke(agent: Agent, *, name: str, timeout_ms: int) -> dict[str, Any]:
    return agent.area(DmaBufs).exporter("revoke", name, timeout_ms)


@registry.method("dmabuf.restore")
def _restore(agent: Agent, *, name: str) -> dict[str, Any]:
    return agent.area(DmaBufs).exporter("restore", name)


@registry.method("dmabuf.move")
def _move(
    agent: Agent, *, name: str, to: str, timeout_ms: int, copy_ms: int | None = None
) -> dict[str, Any]:
    """``to``: ``vram`` or ``system``; ``copy_ms``: its contents follow, behind a fence."""
    queued = () if copy_ms is None else (copy_ms,)
    return agent.area(DmaBufs).exporter("move", name, to, timeout_ms, *queued)


@registry.method("dmabuf.careless")
def _careless(agent: Agent, *, name: str, words: list[str]) -> dict[str, Any]:
    """What the exporter shall do wrong from now on: the module's words."""
    return agent.area(DmaBufs).exporter("careless", name, *words)


@registry.method("dmabuf.abandon")
def _abandon(agent: Agent, *, name: str) -> dict[str, Any]:
    """Wrong: the exporter frees the pages of a buffer that others have mapped."""
    return agent.area(DmaBufs).exporter("abandon", name)


@registry.method("dmabuf.state")
def _state(agent: Agent, *, name: str) -> dict[str, Any]:
    return agent.area(DmaBufs).exporter("state", name)


@registry.method("dmabuf.attach")
def _attach(
    agent: Agent, *, name: str, buffer: str, device: str, manners: list[str]
) -> dict[str, Any]:
    """Import a buffer for a device; ``manners`` are the importer module's words."""
    bufs = agent.area(DmaBufs)
    words = ("attach", device, bufs.buffer(buffer), *manners)
    return bufs.importer(name, " ".join(map(str, words)))[0]


@registry.method("dmabuf.map")
def _map(agent: Agent, *, name: str) -> dict[str, Any]:
    """``{errno, entries, bytes, list}``: the scatter list that the exporter made."""
    return _list(agent.area(DmaBufs).importer(name, "map"))


@registry.method("dmabuf.show")
def _show(agent: Agent, *, name: str) -> dict[str, Any]:
    """As ``dmabuf.map``, of what is mapped already; ENODEV if nothing is."""
    return _list(agent.area(DmaBufs).importer(name, "show"))


@registry.method("dmabuf.import")
def _import(agent: Agent, *, name: str, command: str) -> dict[str, Any]:
    """``unmap``, ``detach``, ``state`` or ``fence MS`` of an import."""
    return agent.area(DmaBufs).importer(name, command)[0]


@registry.method("dmabuf.close_import")
def _close_import(agent: Agent, *, name: str) -> dict[str, Any]:
    agent.area(DmaBufs).close_import(name)
    return {}


@registry.method("dmabuf.write")
def _write(
    agent: Agent,
    *,
    name: str,
    offset: int,
    hex: str,  # noqa: A002  the protocol's word
    how: str,
) -> dict[str, Any]:
    """Bytes into the buffer. ``how``: ``dma``, ``stale``, ``pages`` or ``vmap``."""
    data = bytes.fromhex(hex)
    bufs = agent.area(DmaBufs)
    bufs.put(name, data)
    return bufs.importer(name, _copy("to", offset, len(data), how))[0]


@registry.method("dmabuf.read")
def _read(agent: Agent, *, name: str, offset: int, size_bytes: int, how: str) -> dict[str, Any]:
    """Bytes out of the buffer; as ``dmabuf.write``, with ``hex``."""
    bufs = agent.area(DmaBufs)
    bufs.put(name, bytes(size_bytes))
    answer = bufs.importer(name, _copy("from", offset, size_bytes, how))[0]
    return {**answer, "hex": bufs.get(name, size_bytes).hex()}


@registry.method("dmabuf.late")
def _late(
    agent: Agent,
    *,
    name: str,
    offset: int,
    hex: str,  # noqa: A002  the protocol's word
    after_us: int,
) -> dict[str, Any]:
    """The device writes; the buffer is unmapped ``after_us`` after it was told to (0: it is not).

    ``{errno, begun_ns, late_ns}``: until it had written, from when it was told and from then on.
    """
    data = bytes.fromhex(hex)
    bufs = agent.area(DmaBufs)
    bufs.put(name, data)
    return bufs.importer(name, f"late {offset} {len(data)} {after_us}")[0]


@registry.method("dmabuf.peek")
def _peek(agent: Agent, *, device: str, bar: int, offset: int) -> dict[str, str]:
    """A page of a BAR, as the CPU reads it past any dma-buf."""
    return {"hex": agent.area(DmaBufs).view(device, bar, offset).read(0, _PAGE_BYTES).hex()}


@registry.method("dmabuf.poke")
def _poke(
    agent: Agent,
    *,
    device: str,
    bar: int,
    offset: int,
    hex: str,  # noqa: A002  the protocol's word
) -> dict[str, Any]:
    agent.area(DmaBufs).view(device, bar, offset).write(0, bytes.fromhex(hex))
    return {}


def _list(lines: list[dict[str, Any]]) -> dict[str, Any]:
    first, *rest = lines
    return {"entries": 0, "bytes": 0, **first, "list": rest}


def _copy(direction: str, offset: int, size_bytes: int, how: str) -> str:
    if not 0 < size_bytes <= BOUNCE_BYTES:
        raise ParameterError(f"size: 1 to {BOUNCE_BYTES} bytes, not {size_bytes}")
    place = f"{direction} {offset} {size_bytes}"
    match how:
        case "dma":
            return f"dma {place}"
        case "stale":
            return f"dma {place} stale"
        case "pages" | "vmap":
            return f"cpu {place} {how}"
    raise ParameterError(f"how: {how!r} is none of dma, stale, pages, vmap")
