# SPDX-License-Identifier: Apache-2.0
"""Measurements of the testbed itself: what is compared is measured in turns, in one run.

Absolute times say more about the machine than about the testbed, so every figure that is compared
comes with the ratio of medians; the machine is part of the answer.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from testbed import deploy
from testbed.errors import InputError
from testbed.host.facts import available_memory
from testbed.host.prepare import Installation
from testbed.instruments.bench import Bench
from testbed.instruments.paths import DeviceWitness
from testbed.rack import Rack
from testbed.rack_node import RackNode
from testbed.results.judging import PAGE_BYTES
from testbed.topology import model
from testbed.topology.model import Topology
from testbed.topology.plan import Role

PEER_TIMEOUT_S = 300
SETTLED_S = 5
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    """What this was measured on."""
    cpu = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "load": os.getloadavg(),
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }


class _Racks:
    """Starts racks in a folder that goes away with them."""

    def __init__(self, installation: Installation, accelerator: str, *, warm: bool = False) -> None:
        # Whoever loaded the topology was asked whether it is trusted.
        self._options = deploy.StartOptions(
            installation=installation, accelerator=accelerator, trust=True, warm=warm
        )
        self.stack = ExitStack()
        self._folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self._count = 0

    def start(self, topology: Topology) -> Rack:
        self._count += 1
        run_dir = self._folder / str(self._count)
        return self.stack.enter_context(
            deploy.start(topology, run_dir=run_dir, options=self._options)
        )

    def __enter__(self) -> _Racks:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()


def boot(
    topologies: dict[str, Topology],
    installation: Installation,
    accelerator: str,
    *,
    runs: int,
    peers: Mapping[str, Callable[[], float]] | None = None,
    warm: bool = False,
) -> dict[str, Any]:
    """Seconds from the call to every agent's hello, cold, in turns with ``peers``: by name, what
    runs one and says its seconds.

    :param warm: and restored (as ``NAME --warm``), in turns too; what has to be saved is saved
        before the first is timed.
    :raises TestbedError: as a peer does.
    """
    ways = [(name, each) for name in topologies for each in ((False, True) if warm else (False,))]
    times: dict[str, list[float]] = {}
    for run in range(-1 if warm else 0, runs):
        for name, is_warm in ways:
            with _Racks(installation, accelerator, warm=is_warm) as racks:
                began_s = time.monotonic()
                racks.start(topologies[name])
                if run >= 0:
                    label = f"{name} --warm" if is_warm else name
                    times.setdefault(label, []).append(time.monotonic() - began_s)
        for name, go in (peers or {}).items():
            if run >= 0:
                times.setdefault(name, []).append(go())
    first = statistics.median(next(iter(times.values())))
    return {
        "unit": "s",
        "seconds": {name: summary(values) for name, values in times.items()},
        "ratio_to_first": {
            name: round(statistics.median(values) / first, 3) for name, values in times.items()
        },
    }


def command_seconds(peer: str) -> float:
    """How long a command takes; no shell reads it.

    :raises InputError: it fails.
    """
    began_s = time.monotonic()
    done = subprocess.run(
        shlex.split(peer),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PEER_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise InputError(
            f"the peer's command ended with {done.returncode}: {done.stderr.decode()[-300:]}"
        )
    return time.monotonic() - began_s


def memory(
    topology: Topology,
    installation: Installation,
    accelerator: str,
    *,
    racks: int,
    warm: bool = False,
) -> dict[str, Any]:
    """Host memory of ``racks`` racks of one topology that run at once.

    ``private``: what would be free if the rack ended; ``resident`` counts pages that racks share
    (QEMU's program, for one) in each; both are of all its processes. ``models`` is the private
    part of its device models. Video memory is a memfd and only what a guest touched of it exists;
    it is given apart, as ``vram``. ``share``: the rack's part of all that exists, each page that
    several processes use divided among them (PSS), and each page of a memfd once. ``added`` is how
    much less memory the host had available after each further rack; whatever else ran is in it.
    ``added_mean`` is from the first to when all have been up for a while, by further rack.

    :param warm: restore them.
    """
    with _Racks(installation, accelerator, warm=warm) as started:
        running = []
        available = []
        began_s = time.monotonic()
        for _ in range(racks):
            running.append(started.start(topology))
            available.append(available_mib())
        took_s = time.monotonic() - began_s
        time.sleep(SETTLED_S)
        settled = available_mib()
        each = [memory_of(rack) for rack in running]
        answering = sum(node.alive for rack in running for node in rack.nodes.values())
    added = [before - after for before, after in itertools.pairwise(available)]
    return {
        "unit": "MiB",
        "racks": racks,
        "warm": warm,
        "started_s": round(took_s, 2),
        "machines_alive": answering,
        "added": summary(added) if added else None,
        "added_mean": round((available[0] - settled) / len(added), 1) if added else None,
        "per_rack": {key: summary([row[key] for row in each]) for key in each[0]},
        "total": {key: round(sum(row[key] for row in each), 1) for key in each[0]},
    }


def available_mib() -> float:
    """What the host's programs can still get without swapping."""
    return available_memory() / (1 << 20)


def _shared_memory(pid: int) -> dict[int, float]:
    """The memfds that a process has open, by inode, and how much of each exists (MiB)."""
    found = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(fd.readlink()).startswith("/memfd:"):
                stat = fd.stat()
                found[stat.st_ino] = stat.st_blocks * 512 / 2**20
    return found


def processor_time(rack: Rack) -> dict[str, float]:
    """Seconds that the rack's processes have used so far, by kind: ``qemu``, ``helper`` (device
    models), ``keeper``.
    """
    used: dict[str, float] = {"keeper": used_s(rack.keeper.pid)}
    for process in rack.keeper.status()["processes"]:
        pids = [process["pid"], *children(process["pid"])]
        used[process["kind"]] = used.get(process["kind"], 0) + sum(map(used_s, pids))
    return used


def memory_of(rack: Rack) -> dict[str, float]:
    """Of the host, in MiB: ``resident``, ``private``, ``models``, ``vram``, ``share``, as
    :func:`memory` says.
    """
    totals = {"resident": 0.0, "private": 0.0, "models": 0.0, "vram": 0.0, "share": 0.0}
    shared: dict[int, float] = {}
    processes = {p["pid"]: p["kind"] for p in rack.keeper.status()["processes"]}
    for main, kind in {rack.keeper.pid: "keeper", **processes}.items():
        started = children(main) if kind == "helper" else []
        for pid in (main, *started):
            fields = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            )
            kib = {key: int(value.split()[0]) for key, value in fields.items()}
            private = (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024
            totals["resident"] += kib["Rss"] / 1024
            totals["share"] += (kib["Pss_Anon"] + kib["Pss_File"]) / 1024
            shared |= _shared_memory(pid)
            totals["private"] += private
            totals["models"] += private * (kind == "helper")
    for node in rack.plan.nodes.values():
        for function in node.by_role(Role.VRAM):
            path = f"{node.name}/{function.name}"
            place = rack.keeper.call("memory", name=path)
            stat = Path(f"/proc/{rack.keeper.pid}/fd/{place['fd']}").stat()
            totals["vram"] += stat.st_blocks * 512 / 2**20
    totals["resident"] -= totals["vram"]
    totals["share"] += sum(shared.values())
    return totals


def children(pid: int) -> list[int]:
    """The processes that a process has started and not yet waited for."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def copy(
    topology: Topology,
    installation: Installation,
    accelerator: str,
    *,
    size_bytes: int,
    runs: int,
) -> dict[str, Any]:
    """A GPU's engine copies VRAM to a peer's VRAM: through the vIOMMU, and with the IOMMU off; and
    the host copies the same bytes between the same memories with memcpy.

    Both racks run at once, and all take turns. Speeds are as the guest sees them, but for memcpy.
    """
    with _Racks(installation, accelerator) as racks:
        translated = racks.start(topology).node()
        plain = racks.start(model.with_overrides(topology, iommu_mode="off")).node()
        ways: dict[str, Callable[[], float]] = {
            "translated": _copier(racks.stack, translated, size_bytes, raw=False),
            "iommu off": _copier(racks.stack, plain, size_bytes, raw=True),
            "host memcpy": _host_copier(racks.stack, translated, size_bytes),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for run in range(runs + 1):
            for name, go in ways.items():
                speed = go()
                if run:  # the first copy touches every page for the first time
                    speeds[name].append(speed)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "unit": "MB/s",
        "size_bytes": size_bytes,
        "speed": {name: summary(values) for name, values in speeds.items()},
        "ratio_to": {
            name: round(medians["translated"] / medians[name], 3)
            for name in ("iommu off", "host memcpy")
        },
    }


def _host_copier(stack: ExitStack, node: RackNode, size_bytes: int) -> Callable[[], float]:
    source, target = (
        memoryview(stack.enter_context(node.host_memory(f.name)))
        for f in node.plan.by_role(Role.VRAM)[:2]
    )
    stack.callback(source.release)
    stack.callback(target.release)

    def go() -> float:
        began_s = time.perf_counter()
        target[:size_bytes] = source[:size_bytes]
        return size_bytes / 1e6 / (time.perf_counter() - began_s)

    return go


def latency(
    topology: Topology, installation: Installation, accelerator: str, *, runs: int
) -> dict[str, Any]:
    """From a model's doorbell to its fence, for copies of 4 bytes, on the host's clock: the time
    between the two in the model's own trace. Beside it what the guest saw of the same copies.

    :raises InputError: the first GPU's engine is no model.
    """
    with _Racks(installation, accelerator) as racks:
        node = racks.start(topology).node()
        chosen = next(iter(node.plan.by_role(Role.ENGINE)))
        witness = DeviceWitness.of(node, chosen)
        if witness is None:
            raise InputError("latency: only model engines keep a trace", hint="--engine model")
        guest: list[float] = []
        host: list[float] = []
        bench = Bench.open(node, [*node.plan.by_role(Role.VRAM)[:2], chosen])
        engine = bench.engine(chosen)
        memory = bench.vram(node.plan.by_role(Role.VRAM)[0])
        iova = bench.mapper.map(memory).iova
        for run in range(runs + 1):
            node.models.call("reset_trace", device=chosen.device)
            status = engine.copy(iova, iova + PAGE_BYTES, 4)
            trace = node.models.call("trace", device=chosen.device)
            if run:  # the first finds nothing cached
                times = {entry["what"]: entry["time_us"] for entry in trace}
                host.append(times["commands"] - times["doorbells"])
                guest.append(status.elapsed_ns / 1000)
        bench.close()
    return {"unit": "us", "doorbell_to_fence": summary(host), "guest": summary(guest)}


def idle(
    topology: Topology, installation: Installation, accelerator: str, *, seconds: int
) -> dict[str, Any]:
    """Processor time of a rack's device models while nobody uses them, in clock ticks (10 ms)."""
    with _Racks(installation, accelerator) as racks:
        rack = racks.start(topology)
        time.sleep(1)  # the end of the boot
        helpers = [p["pid"] for p in rack.keeper.status()["processes"] if p["kind"] == "helper"]
        pids = [pid for helper in helpers for pid in (helper, *children(helper))]
        before = sum(map(used_s, pids))
        time.sleep(seconds)
        used = round((sum(map(used_s, pids)) - before) / TICK_S)
    return {"unit": "ticks", "processes": len(pids), "seconds": seconds, "used": used}


def used_s(pid: int) -> float:
    """Processor time of a process so far. :raises OSError: it has ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def _copier(stack: ExitStack, node: RackNode, size_bytes: int, *, raw: bool) -> Callable[[], float]:
    vrams = node.plan.by_role(Role.VRAM)[:2]
    chosen = next(f for f in node.plan.by_role(Role.ENGINE) if f.device == vrams[0].device)
    bench = Bench.open_raw(node, [*vrams, chosen]) if raw else Bench.open(node, [*vrams, chosen])
    stack.callback(bench.close)
    memories = [bench.vram(function) for function in vrams]
    engine = bench.engine(chosen, memories[0] if raw else None)
    if raw:
        addresses = [memory.bus_address or 0 for memory in memories]
    else:
        addresses = [bench.mapper.map(memory).iova for memory in memories]

    def go() -> float:
        status = engine.copy(addresses[0], addresses[1], size_bytes)
        return size_bytes / 1e6 / (status.elapsed_ns / 1e9)

    return go
