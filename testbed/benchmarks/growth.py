# SPDX-License-Identifier: Apache-2.0
"""Cost as work grows: GPUs in a machine, racks at once, cells of a matrix.

Each measurement is a list of points with the size as ``x``, so that a plot shows where it bends.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import deploy
from testbed.benchmarks import machines
from testbed.errors import HostError, TestbedError
from testbed.host.prepare import Installation
from testbed.machine import argv
from testbed.machine.command import LaunchContext
from testbed.rack import Rack
from testbed.rack_node import RackNode
from testbed.topology import load, placement
from testbed.topology.model import Topology

GPUS = (1, 2, 4, 8, 16, 32, 64)
BOOTED_GPUS = (1, 2, 4, 8, 16, 32)
RACKS = (1, 2, 4, 8, 16)
CELLS = (10, 30, 100, 300, 1000)
CELLS_TIMEOUT_S = 1800.0
_BELOW = 16  # GPUs below one switch

_MATRIX = """\
matrix: growth
topologies: [minimal]
suites: [empty]
repeat: {cells}
"""


@dataclass(frozen=True)
class Extent:
    """How often, how far (``most``; None: all sizes), from saved machines, on which cluster."""

    runs: int
    warm: bool = False
    most: int | None = None
    cluster: str = "local:2"


def measure(
    what: str, topology: Topology, installation: Installation, accelerator: str, extent: Extent
) -> dict[str, Any]:
    """``render``, ``gpus``, ``racks`` or ``cells``."""
    if what == "render":
        return render(runs=extent.runs, sizes=up_to(extent.most, GPUS))
    if what == "gpus":
        sizes = up_to(extent.most, BOOTED_GPUS)
        return gpus(installation, accelerator, runs=extent.runs, sizes=sizes)
    if what == "racks":
        sizes = up_to(extent.most, RACKS)
        return racks(topology, installation, accelerator, warm=extent.warm, sizes=sizes)
    return cells(cluster=extent.cluster, sizes=up_to(extent.most, CELLS))


def up_to(most: int | None, sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes that are measured: all, or those up to ``most``, with it."""
    if most is None:
        return tuple(sizes)
    return tuple(sorted({size for size in sizes if size <= most} | {most}))


def rack_of(gpus: int) -> str:
    """A topology file: one machine, up to sixteen GPUs below each switch."""
    lines = [f"rack: gpus-{gpus}", "nodes:", "  host0:", "    machine: {memory: 1G}", "    pcie:"]
    for switch, first in enumerate(range(0, gpus, _BELOW)):
        lines += [
            f"      - root_port: rp{switch}",
            "        below:",
            f"          - switch: sw{switch}",
            "            acs: redirect",
            "            below:",
        ]
        lines += [
            f"              - {{gpu: gpu{number}, vram: 16M}}"
            for number in range(first, min(first + _BELOW, gpus))
        ]
    return "\n".join(lines) + "\n"


def render(*, runs: int, sizes: Sequence[int] = GPUS) -> dict[str, Any]:
    """From a file's text to QEMU's command line, by the number of GPUs. Nothing starts."""
    context = LaunchContext(
        qemu=("qemu-system-x86_64",),
        environment={},
        accelerator="tcg",
        kernel=Path("KERNEL"),
        initrd=Path("INITRD"),
        quick_firmware="qboot.rom",
    )
    points = []
    for size in sizes:
        text = rack_of(size)
        times: dict[str, list[float]] = {"load": [], "place": [], "command": []}
        for run in range(runs + 1):
            stamps = [time.perf_counter()]
            topology = load.load_text(text, "growth.yaml", {})
            stamps.append(time.perf_counter())
            plan = placement.place(topology)
            stamps.append(time.perf_counter())
            for name, node in plan.nodes.items():
                argv.command(node, topology.nodes[name], context)
            stamps.append(time.perf_counter())
            if run:  # the first imports and compiles what it needs
                for name, began_s, ended_s in zip(times, stamps, stamps[1:], strict=False):
                    times[name].append((ended_s - began_s) * 1000)
        medians = {name: round(statistics.median(each), 2) for name, each in times.items()}
        points.append({"x": size, **medians, "all": round(sum(medians.values()), 2)})
    return {"unit": "ms", "x": "GPUs in one machine", "points": points}


def gpus(
    installation: Installation, accelerator: str, *, runs: int, sizes: Sequence[int] = BOOTED_GPUS
) -> dict[str, Any]:
    """From the call to the agent's hello, cold, by the number of GPUs; in turns.

    Beside it processor time until then, of QEMU and of the device models, and the host's memory:
    all of it, and what the models have for themselves. The guest must have found every function and
    given each BAR a place; a size where it has not, or that does not start, ends the series, with
    the reason.
    """
    options = deploy.StartOptions(installation=installation, accelerator=accelerator)
    topologies = {size: load.load_text(rack_of(size), "growth.yaml", {}) for size in sizes}
    found: dict[int, list[dict[str, float]]] = {}
    stopped = ""
    for _ in range(runs):
        for size, topology in topologies.items():
            with tempfile.TemporaryDirectory() as folder:
                began_s = time.monotonic()
                try:
                    with deploy.start(topology, run_dir=Path(folder), options=options) as rack:
                        seconds = time.monotonic() - began_s
                        found.setdefault(size, []).append({"boot": seconds, **_used(rack)})
                        lacks = lacking(rack.node())
                except TestbedError as error:
                    lacks = [error.message]
            if lacks:
                stopped = f"{size} GPUs: {'; '.join(lacks[:3])}"
                break
    points = [
        {"x": size, **{key: round(statistics.median(r[key] for r in rows), 2) for key in rows[0]}}
        for size, rows in found.items()
    ]
    return {"unit": "s, MiB", "x": "GPUs in one machine", "points": points, "stopped": stopped}


def _used(rack: Rack) -> dict[str, float]:
    """Processor time so far, and memory, of a rack that has just answered."""
    cpu_s = machines.processor_time(rack)
    memory = machines.memory_of(rack)
    return {
        "qemu_cpu": cpu_s.get("qemu", 0.0),
        "models_cpu": cpu_s.get("helper", 0.0),
        "memory": memory["share"],
        "models_memory": memory["models"],
    }


def lacking(node: RackNode) -> list[str]:
    """What the guest has not found of what was planned, or has found no place for."""
    tree = {each["bdf"]: each for each in node.agent.call("pci.tree")["devices"]}
    lacks = []
    for function in node.plan.functions:
        name = f"{function.name} at {function.bdf}"
        if function.bdf not in tree:
            lacks.append(f"the guest has no {name}")
            continue
        for bar in tree[function.bdf]["bars"]:
            if not bar["address"]:
                lacks.append(f"no place for BAR {bar['index']} of {name}")
    return lacks


def racks(
    topology: Topology,
    installation: Installation,
    accelerator: str,
    *,
    warm: bool,
    sizes: Sequence[int] = RACKS,
) -> dict[str, Any]:
    """Racks of one topology at once: memory of the host that is gone, and how long the next took.

    ``memory`` is how much less the host has available (/proc/meminfo) than before the first, some
    seconds after the last; ``share`` a rack's part of what their processes have (PSS and memfds).
    """
    options = deploy.StartOptions(
        installation=installation, accelerator=accelerator, trust=True, warm=warm
    )
    points: list[dict[str, float]] = []
    started: list[Rack] = []
    stopped = ""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if warm:  # what has to be saved is saved before anything is measured
            deploy.start(topology, run_dir=folder / "saved", options=options).close()
        before = machines.available_mib()
        for size in sizes:
            began_s = time.monotonic()
            added = size - len(started)
            try:
                while len(started) < size:
                    where = folder / str(len(started))
                    rack = deploy.start(topology, run_dir=where, options=options)
                    started.append(stack.enter_context(rack))
            except TestbedError as error:
                stopped = f"{size} racks: {error.message}"
                break
            seconds = time.monotonic() - began_s
            time.sleep(machines.SETTLED_S)
            if not all(node.alive for rack in started for node in rack.nodes.values()):
                stopped = f"{size} racks: not all machines are alive"
                break
            share = statistics.median(machines.memory_of(rack)["share"] for rack in started)
            used = before - machines.available_mib()
            points.append(
                {
                    "x": size,
                    "memory": round(used, 1),
                    "memory_per_rack": round(used / size, 1),
                    "share": round(share, 1),
                    "seconds_per_rack": round(seconds / added, 2),
                }
            )
    return {
        "unit": "MiB, s",
        "x": "racks at once",
        "warm": warm,
        "points": points,
        "stopped": stopped,
    }


def cells(*, cluster: str, sizes: Sequence[int] = CELLS) -> dict[str, Any]:
    """What a matrix costs beside its cells: empty ones, here and on a local cluster, by number.

    :param cluster: a word of ``--cluster``; measured in turns with this machine's own pool.
    :raises HostError: a matrix did not end as it should.
    """
    points = []
    for size in sizes:
        point: dict[str, Any] = {"x": size}
        for name, words in (("pool", []), ("cluster", ["--cluster", cluster])):
            seconds, used_s = _matrix(size, words)
            point |= {name: round(seconds, 2), f"{name}_cpu": round(used_s, 2)}
            point[f"{name}_ms_per_cell"] = round(1000 * seconds / size, 1)
        points.append(point)
    return {"unit": "s", "x": "empty cells", "cluster": cluster, "points": points}


def _matrix(size: int, words: Sequence[str]) -> tuple[float, float]:
    """Seconds of a whole `testbed matrix`, and of processor time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "growth.matrix.yaml"
        file.write_text(_MATRIX.format(cells=size))
        command = [sys.executable, "-m", "testbed.cli", "matrix", str(file), *words]
        before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run(
            [*command, "--output", f"{folder}/run", "--format", "json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CELLS_TIMEOUT_S,
            check=False,
        )
        seconds, after = time.monotonic() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(done.stdout)["cells"] if done.stdout else []
    if len(found) != size:
        raise HostError(f"{len(found)} of {size} cells ended: {done.stderr.decode()[-500:]}")
    used_s = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return seconds, used_s
