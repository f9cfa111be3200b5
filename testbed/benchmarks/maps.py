# SPDX-License-Identifier: Apache-2.0
"""What mapping video memory for a peer costs the guest's kernel (MAP-16), as ratios in one run.

The same memory, mapped for one device: page by page, in pieces of 2 MiB, and at once, each by
``dma_map_phys()`` in a loop of our exporter module; and, where the kernel allows the pair
peer-to-peer DMA, as its own ``dma_buf_phys_vec_to_sgt()`` does it. The guest's clock.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from testbed import deploy
from testbed.benchmarks.machines import summary
from testbed.errors import CapabilityMissing, TestbedError
from testbed.host.prepare import Installation
from testbed.instruments.dmabuf import REVOCABLE, Exchange, Range, buffer_pairs, errno_word
from testbed.instruments.interface import Rack
from testbed.instruments.reasons import why_not_shown
from testbed.results.judging import PAGE_BYTES
from testbed.suites.dmabuf_fixtures import opened
from testbed.topology.model import Topology

LARGE_PAGE_BYTES = 2 << 20
# By name: the exporter's mode, and how much it maps at once.
WAYS = {
    "contiguous": ("no-check", 0),
    "by_2mib": ("no-check", LARGE_PAGE_BYTES),
    "by_page": ("no-check", PAGE_BYTES),
    "kernel": ("provider", 0),
}


def maps(
    topology: Topology,
    installation: Installation,
    accelerator: str,
    *,
    size_bytes: int,
    runs: int,
) -> dict[str, Any]:
    """Microseconds to map and to unmap ``size_bytes``, in turns; ratios to mapping all at once.

    :raises CapabilityMissing: the rack or its kernel cannot show it.
    """
    options = deploy.StartOptions(installation=installation, accelerator=accelerator, trust=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        deploy.start(topology, run_dir=Path(folder) / "rack", options=options) as rack,
    ):
        return measure(rack, size_bytes=size_bytes, runs=runs)


def measure(rack: Rack, *, size_bytes: int, runs: int) -> dict[str, Any]:
    """The same on a rack that runs."""
    pair = next(iter(buffer_pairs(rack.plan)), None)
    if pair is None:
        raise CapabilityMissing("two GPUs, one of which has an engine (edu or the GPU model)")
    iommu = rack.topology.nodes[pair.node].iommu
    if why := why_not_shown(iommu):
        raise CapabilityMissing(why)
    with opened(rack.nodes[pair.node], pair, iommu, through_host=True) as exchange:
        ways = {
            name: (_samples(), way)
            for name, way in WAYS.items()
            if name != "kernel" or _is_allowed(exchange)
        }
        for _ in range(runs):
            for samples, (mode, chunk_bytes) in ways.values():
                mapped, unmapped = _once(exchange, mode, chunk_bytes, size_bytes)
                samples["map"].append(mapped)
                samples["unmap"].append(unmapped)
    times = {
        name: {verb: summary(values) for verb, values in samples.items()}
        for name, (samples, _) in ways.items()
    }
    return {
        "unit": "us",
        "size_bytes": size_bytes,
        "pair": str(pair),
        "times": times,
        "ratio_to_contiguous": {
            name: {
                verb: round(value["median"] / times["contiguous"][verb]["median"], 2)
                for verb, value in verbs.items()
            }
            for name, verbs in times.items()
        },
    }


def _samples() -> dict[str, list[float]]:
    return {"map": [], "unmap": []}


def _is_allowed(exchange: Exchange) -> bool:
    buffer = exchange.export("provider")
    importer = buffer.attach(REVOCABLE)
    allowed = not importer.errno
    importer.close()
    buffer.call("close")
    return allowed


def _once(exchange: Exchange, mode: str, chunk_bytes: int, size_bytes: int) -> tuple[float, float]:
    buffer = exchange.export(mode, Range(0, size_bytes), chunk_bytes=chunk_bytes)
    importer = buffer.attach(REVOCABLE)
    mapped = importer.map()
    if buffer.errno or importer.errno or mapped.errno or mapped.size_bytes != size_bytes:
        word = errno_word(buffer.errno or importer.errno or mapped.errno)
        raise TestbedError(f"mapping {mapped.size_bytes} of {size_bytes} bytes: {word}")
    importer.command("unmap")
    state = importer.command("state")
    importer.close()
    buffer.call("close")
    return state["map_ns"] / 1000, state["unmap_ns"] / 1000
