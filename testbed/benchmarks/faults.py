# SPDX-License-Identifier: Apache-2.0
"""How long a page fault takes that the agent answers, by device kind and by where the page is.

Each sample is a first touch: the device is told to access a page that is not there. ``seen`` is the
time from the doorbell until the agent has the fault record, ``serviced`` until it has mapped the
page and asked for the replay, ``done`` until the access is there; the guest's clock. Beside it the
device's own word, on the host's clock: from its fault to the driver's replay.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed import deploy
from testbed.errors import InputError
from testbed.host.prepare import Installation
from testbed.instruments.bench import Bench
from testbed.instruments.interface import Rack, RackNode
from testbed.instruments.model_devices import ModelGpu, ModelNic, place
from testbed.results.judging import PAGE_BYTES
from testbed.topology.model import Gpu, Topology
from testbed.topology.plan import Function, Role

LARGE_PAGE_BYTES = 2 << 20
BACKING_AT = 8 << 20  # in a video memory
BACKING_BYTES = 4 << 20
ROUNDS = 4  # what is compared is measured in turns
MAX_COUNT = 800  # a round's events must fit into the device's trace
WAYS = ("poll", "interrupt")
NIC_BASE = 1 << 36
STEPS = ("seen", "serviced", "done")
_BAR = 40
_NO_GPU = "page faults: the rack has no GPU model"


@dataclass
class Series:
    """First touches of one kind. ``call`` is the agent's method and its parameters."""

    device: ModelGpu | ModelNic
    kind: str
    path: str
    page_bytes: int
    by: str
    params: Mapping[str, Any]
    steps: dict[str, list[float]] = field(default_factory=lambda: {step: [] for step in STEPS})
    on_device: list[float] = field(default_factory=list)

    def run(self, count: int) -> None:
        """Take that many samples."""
        self.device.model("reset_trace")
        answer = self.device.call("fault_latency", count=count, by=self.by, **self.params)
        for step in STEPS:
            self.steps[step] += [ns / 1000 for ns in answer[f"{step}_ns"]]
        self.on_device += device_times(self.device.model("trace"))

    def report(self) -> dict[str, Any]:
        """For JSON; times in microseconds."""
        totals = [sum(sample) for sample in zip(*self.steps.values(), strict=True)]
        return {
            "device": self.kind,
            "path": self.path,
            "page_bytes": self.page_bytes,
            "by": self.by,
            "count": len(totals),
            "total": spread(totals),
            **{step: spread(values) for step, values in self.steps.items()},
            "on_device": spread(self.on_device),
            "histogram": histogram(totals),
            "samples": [round(total, 1) for total in totals],
        }


def device_times(trace: Sequence[Mapping[str, Any]]) -> list[float]:
    """Microseconds from each page fault to its replay, by a device's trace."""
    times = []
    began = None
    for entry in trace:
        if entry["what"] == "page_faults":
            began = entry["time_us"]
        elif entry["what"] == "replays" and began is not None:
            times.append(float(entry["time_us"] - began))
            began = None
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median, 90th and 99th percentile (nearest rank), and maximum."""
    ordered = sorted(values)
    ranks = {"min": 0.0, "p90": 0.90, "p99": 0.99, "max": 1.0}
    found = {
        name: ordered[max(0, -int(-rank * len(ordered) // 1) - 1)] for name, rank in ranks.items()
    }
    found["median"] = statistics.median(ordered)
    return {name: round(found[name], 1) for name in ("min", "median", "p90", "p99", "max")}


def histogram(values: Sequence[float]) -> list[dict[str, float]]:
    """How many values are in each power of two: ``{from, to, count}``, without gaps."""
    exponents = [max(0, int(value).bit_length() - 1) for value in values]
    return [
        {
            "from": float(1 << exponent) if exponent else 0.0,
            "to": float(2 << exponent),
            "count": exponents.count(exponent),
        }
        for exponent in range(min(exponents), max(exponents) + 1)
    ]


def faults(
    topology: Topology, installation: Installation, accelerator: str, *, count: int
) -> dict[str, Any]:
    """:func:`measure` on a rack that is booted for it.

    :raises InputError: as there.
    """
    check(count)
    if not any(isinstance(e, Gpu) for node in topology.nodes.values() for e in node.entries()):
        raise InputError(_NO_GPU)
    options = deploy.StartOptions(installation=installation, accelerator=accelerator, trust=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        deploy.start(topology, run_dir=Path(folder), options=options) as rack,
    ):
        node = _node(rack)
        return _measure(_open(node), node, count)  # the devices end with the rack


def check(count: int) -> None:
    """:raises InputError: so many touches cannot be measured."""
    if not ROUNDS <= count <= MAX_COUNT:
        raise InputError(f"--count: {ROUNDS} to {MAX_COUNT} faults of each kind, not {count}")


def measure(rack: Rack, count: int) -> dict[str, Any]:
    """``count`` first touches of each kind, on the first node that has a GPU model.

    :raises InputError: there is none.
    """
    node = _node(rack)
    with contextlib.closing(_open(node)) as bench:
        return _measure(bench, node, count)


def _measure(bench: Bench, node: RackNode, count: int) -> dict[str, Any]:
    series = list(_series(bench, node))
    for turn in range(ROUNDS):
        for each in series:
            each.run(count * (turn + 1) // ROUNDS - count * turn // ROUNDS)
    return {"unit": "us", "series": [each.report() for each in series]}


def _node(rack: Rack) -> RackNode:
    for node in rack.nodes.values():
        if _engines(node, "model"):
            return node
    raise InputError(_NO_GPU)


def text(result: Mapping[str, Any]) -> str:
    """The result for people: a histogram of each series."""
    lines = []
    for each in result["series"]:
        total, steps = each["total"], "  ".join(f"{s} {each[s]['median']:.0f}" for s in STEPS)
        page = "2 MiB" if each["page_bytes"] == LARGE_PAGE_BYTES else "4 KiB"
        what = f"{each['device']}, {each['path']}, {page} pages, by {each['by']}"
        lines += [
            f"{what}: {each['count']} faults, in us",
            "  " + "  ".join(f"{name} {value:.0f}" for name, value in total.items()),
            f"  medians: {steps}; fault to replay on the device {each['on_device']['median']:.0f}",
        ]
        most = max(bucket["count"] for bucket in each["histogram"])
        for bucket in each["histogram"]:
            bar = "#" * -(-_BAR * int(bucket["count"]) // int(most))
            low, high, number = bucket["from"], bucket["to"], bucket["count"]
            lines.append(f"  {low:>8.0f} .. {high:>8.0f} {number:>5} {bar}".rstrip())
        lines.append("")
    return "\n".join(lines)


def _engines(node: RackNode, kind: str) -> list[Function]:
    return [f for f in node.plan.by_role(Role.ENGINE) if f.kind == kind]


def _chosen(node: RackNode) -> list[Function]:
    return _engines(node, "model") + _engines(node, "model-nic")[:1]


def _open(node: RackNode) -> Bench:
    return Bench.open(node, [*node.plan.by_role(Role.VRAM), *_chosen(node)])


def _series(bench: Bench, node: RackNode) -> Iterator[Series]:
    engines = _chosen(node)
    gpus = [ModelGpu(bench, f.device) for f in engines if f.kind == "model"]
    ram = bench.buffer("pages", BACKING_BYTES)
    system = bench.mapper.map(ram).iova
    peer = bench.mapper.map(gpus[-1].vram).iova + BACKING_AT if gpus[1:] else None
    gpu = next((each for each in gpus if each.links), gpus[0])
    places = {"VRAM": place("vram", BACKING_AT), "system memory": place("system", system)}
    if peer is not None and gpu is not gpus[-1]:
        places["PCIe peer"] = place("peer", peer)
    if _exports(gpus, gpu):
        places["link"] = place("link", 0, 0)
    for path, backing in places.items():
        for page_bytes in (PAGE_BYTES, LARGE_PAGE_BYTES):
            params = {"backing": backing, "backing_bytes": BACKING_BYTES, "page_bytes": page_bytes}
            for by in WAYS:
                yield Series(gpu, "gpu", path, page_bytes, by, params)
    for function in engines:
        if function.kind == "model-nic":
            yield from _nic_series(bench, function.device, {"system memory": system}, peer)


def _exports(gpus: Sequence[ModelGpu], gpu: ModelGpu) -> bool:
    """Have every other GPU with links export a window; is there one behind link 0 of ``gpu``?"""
    for other in gpus:
        if other is not gpu:
            for link in range(other.links):
                window = {"offset": BACKING_AT, "size_bytes": BACKING_BYTES}
                other.call("link_export", link=link, mode="physical", **window)
    return bool(gpu.links and gpu.call("links")[0]["peer_size_bytes"] >= BACKING_BYTES)


def _nic_series(
    bench: Bench, device: str, iovas: dict[str, int], peer: int | None
) -> Iterator[Series]:
    nic = ModelNic(bench, device)
    table = bench.buffer("table", PAGE_BYTES)
    nic.call(
        "region",
        index=1,
        base=NIC_BASE,
        size_bytes=PAGE_BYTES * (PAGE_BYTES // 8),
        iova=bench.mapper.map(table).iova,
        rights=["local_write", "remote_read", "remote_write"],
        table=table.target,
    )
    if peer is not None:
        iovas["PCIe peer"] = peer
    for path, iova in iovas.items():
        for by in WAYS:
            params = {"index": 1, "iova": iova, "backing_bytes": BACKING_BYTES}
            yield Series(nic, "nic", path, PAGE_BYTES, by, params)
