# SPDX-License-Identifier: Apache-2.0
"""Does anything grow when buffers are attached, mapped, moved and unmapped for ever?

The protocol core does it on real devices in a guest. Watched are the agent (memory, descriptors,
Python's objects), what the devices hold (video memory, RAM, addresses), the kernel's own count of
VFIO mappings, and on the host QEMU and the model processes. Whatever is the same after each cycle
must be the same at the end as after the first fifth, in which caches fill.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testbed import deploy
from testbed.benchmarks.machines import children
from testbed.errors import InputError
from testbed.host.prepare import Installation
from testbed.instruments.mutations import Mutation
from testbed.instruments.negotiation_board import NegotiationBoard, do
from testbed.rack import Rack
from testbed.topology.model import Topology
from testbed.topology.plan import Role

BATCH = 100
SIZE_BYTES = 64 << 10
# What may not change at all, and what may grow so much whatever the number of cycles: allocators
# keep some room, and a process's memory is counted in pages.
EXACT = ("vram", "ram", "iovas", "mappings_left", "descriptors", "queued", "buffers")
ROOM_KIB = {"rss_kib": 1024, "models_private_kib": 2048}
SAMPLES = 5
ROOM_OBJECTS = 200


def booted(
    topology: Topology, installation: Installation, accelerator: str, *, count: int
) -> dict[str, Any]:
    """:func:`cycles` on a rack that is booted for it. :raises InputError: as there."""
    options = deploy.StartOptions(installation=installation, accelerator=accelerator, trust=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        deploy.start(topology, run_dir=Path(folder), options=options) as rack,
    ):
        return cycles(rack, count)


def cycles(rack: Rack, count: int, mutation: Mutation = Mutation.NONE) -> dict[str, Any]:
    """``count`` cycles, half over PCIe alone and half with everything that the devices have.

    :param mutation: a break of the core, to see something grow.
    :returns: ``{cycles, wrong, seconds, samples, grown}``; ``grown`` says what grew between the
        first sample and the last, and is empty if nothing did.
    :raises InputError: there are no two GPU models behind an IOMMU, or too few cycles are wanted.
    """
    if count < 3 * BATCH:
        raise InputError(f"--count: at least {3 * BATCH} cycles, not {count}")
    node = _node(rack)
    with contextlib.closing(NegotiationBoard(rack, node, mutation)) as board:
        return _run(board, rack, count)


def _node(rack: Rack) -> str:
    for name, plan in rack.plan.nodes.items():
        models = [f for f in plan.by_role(Role.ENGINE) if f.kind == "model"]
        if len(models) > 1 and rack.topology.nodes[name].iommu.mode not in ("off", "passthrough"):
            return name
    raise InputError("cycles: no machine with two GPU models behind an IOMMU that translates")


def _run(board: NegotiationBoard, rack: Rack, count: int) -> dict[str, Any]:
    exporter, importer = board.gpus[:2]
    wrong = done = 0
    began_s = time.monotonic()
    samples: list[dict[str, int]] = []
    every = max(2 * BATCH, count // SAMPLES // BATCH * BATCH)  # by then both kinds have been seen
    while done < count:
        kinds = ("pcie", "system") if done // BATCH % 2 else ("link", "pcie", "system")
        offers = {name: board.gpu_offers(name, *kinds) for name in (exporter, importer)}
        size = min(BATCH, count - done)
        (answer,) = board.run(
            do("cycles", exporter=exporter, importer=importer, count=size, size_bytes=SIZE_BYTES,
               offers=offers)
        )  # fmt: skip
        wrong += answer["wrong"]
        done += size
        board.events()
        if done % every == 0 or done >= count:
            samples.append({"cycles": done, **_held(board, rack)})
    return {
        "cycles": done,
        "wrong": wrong,
        "seconds": round(time.monotonic() - began_s, 1),
        "samples": samples,
        "grown": grown(samples[0], samples[-1]),
    }


def grown(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """What is more (or, of what is left, less) than it may be: a line each."""
    found = []
    for name, first in before.items():
        last = after[name]
        room = ROOM_OBJECTS if name == "objects" else ROOM_KIB.get(name)
        exact = name in EXACT or name.endswith("_descriptors")
        if last != first if exact else room is not None and last > first + room:
            found.append(f"{name}: {first}, then {last}")
    return found


def _held(board: NegotiationBoard, rack: Rack) -> dict[str, int]:
    board.events()
    board.events()  # the second call tells the agent that the first has arrived
    (guest,) = board.run(do("held"))
    return {**guest, **_on_the_host(rack)}


def _on_the_host(rack: Rack) -> dict[str, int]:
    """Descriptors of the rack's processes on the host, and the private memory of its QEMUs and of
    its models. QEMU's says little: an emulator keeps what it has translated.
    """
    kib = {"qemu": 0, "helper": 0}
    descriptors = 0
    kinds = {process["pid"]: process["kind"] for process in rack.keeper.status()["processes"]}
    kinds |= {child: kind for main, kind in list(kinds.items()) for child in children(main)}
    for pid, kind in kinds.items():
        fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {key: int(value.split()[0]) for key, _, value in (f.partition(":") for f in fields)}
        kib[kind] = kib.get(kind, 0) + sizes["Private_Clean"] + sizes["Private_Dirty"]
        descriptors += len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {
        "qemu_private_kib": kib["qemu"],
        "models_private_kib": kib["helper"],
        "host_descriptors": descriptors,
    }
