# SPDX-License-Identifier: Apache-2.0
"""The verb that measures the testbed itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from testbed.errors import ExitCode
from testbed.verbs.common import (
    engine_option,
    load_topology,
    override_options,
    print_json,
    settings_option,
    trust_option,
)

IDLE_S = 10
GROWTH = ("render", "gpus", "racks", "cells")
WHAT = (
    *("boot", "memory", "copy", "latency", "idle", "map", "cycles"),
    *("suite", *GROWTH),
)


@click.command()
@click.argument("what", type=click.Choice(WHAT))
@click.option(
    "-t",
    "--topology",
    "files",
    multiple=True,
    metavar="FILE",
    help="Measure this rack; `boot` takes several and compares.  [default: quad-gpu]",
)
@settings_option
@override_options
@engine_option()
@trust_option
@click.option("--runs", default=5, show_default=True, help="How often; medians are compared.")
@click.option("--count", default=10_000, show_default=True, help="`cycles`: so many.")
@click.option("--racks", default=1, show_default=True, help="`memory`: how many at once.")
@click.option(
    "--size",
    "size_mib",
    default=16,
    show_default=True,
    metavar="MIB",
    help="`copy`, `map`: how much, at most the VRAM less 64 KiB.",
)
@click.option(
    "--warm",
    is_flag=True,
    help="`boot`: restored machines too, in turns with booted; `memory`: restored ones.",
)
@click.option(
    "--peer",
    default="",
    metavar="COMMAND",
    help="`boot`: a command to time in turns with ours; no shell reads it.",
)
@click.option(
    "--against",
    type=click.Choice(["virtme-ng"]),
    help="`boot`: in turns with this, installed into an environment of its own on the way.",
)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="SUITE",
    help="`suite`: run these.  [default: p2p-iommu]",
)
@click.option(
    "--most",
    type=click.IntRange(1),
    metavar="N",
    help="`render`, `gpus`, `racks`, `cells`: the largest size.",
)
@click.option(
    "--cluster",
    default="local:2",
    show_default=True,
    metavar="ADDRESS",
    help="`cells`: beside the pool of this machine.",
)
@click.option(
    "--plot",
    metavar="FILE.svg",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Also draw it.",
)
def bench(
    what: str,
    files: tuple[str, ...],
    settings: tuple[str, ...],
    kernel: str | None,
    iommu_mode: str | None,
    engine: str | None,
    trust: bool,
    runs: int,
    count: int,
    racks: int,
    size_mib: int,
    warm: bool,
    peer: str,
    against: str | None,
    suites: tuple[str, ...],
    most: int | None,
    cluster: str,
    plot: Path | None,
) -> None:
    """Measure the testbed itself, as JSON with the machine it was measured on.

    boot: command to agent's hello. memory: of the host. copy: VRAM to VRAM, against no IOMMU and
    against memcpy. latency: a model's doorbell to its fence. idle: what models use for nothing.
    cycles: does anything grow when buffers are attached, mapped, moved and unmapped for ever?
    map: what mapping video memory for a peer costs the guest's kernel, by page and at once.
    suite: seconds for each requirement, and processor time by who used it. As work grows: render
    (topology to command line), gpus (boot), racks (memory, seconds), cells (of a matrix, empty).

    What is compared is measured in turns, in one run: quote the ratios.
    """
    from testbed.benchmarks import cycles as bench_cycles
    from testbed.benchmarks import growth, virtme
    from testbed.benchmarks import machines as measure
    from testbed.benchmarks import maps as bench_maps
    from testbed.benchmarks import suite as bench_suite
    from testbed.benchmarks.plot import svg
    from testbed.host import probe
    from testbed.verbs.install import install_for, options

    topologies = {
        file: load_topology(
            file, settings, kernel=kernel, iommu_mode=iommu_mode, engine=engine, trust=trust
        )
        for file in files or ("quad-gpu",)
    }
    first = next(iter(topologies.values()))
    installation = install_for(topologies.values())
    accelerator = probe.accelerator(installation)
    result: dict[str, Any]
    if what == "boot":
        if against:
            with options() as setup:
                peer = virtme.command(installation, accelerator, setup)
        result = measure.boot(
            topologies, installation, accelerator, runs=runs, peer=peer, warm=warm
        )
    elif what == "memory":
        result = measure.memory(first, installation, accelerator, racks=racks, warm=warm)
    elif what == "latency":
        result = measure.latency(first, installation, accelerator, runs=runs)
    elif what == "idle":
        result = measure.idle(first, installation, accelerator, seconds=IDLE_S)
    elif what == "cycles":
        result = bench_cycles.booted(first, installation, accelerator, count=count)
    elif what == "suite":
        words = [word for file in files or ("quad-gpu",) for word in ("-t", file)]
        words += ["--warm"] if warm else []
        result = bench_suite.cost([*(suites or ("p2p-iommu",)), *words], runs=runs)
    elif what in GROWTH:
        result = growth.measure(
            what,
            first,
            installation,
            accelerator,
            growth.Extent(runs, warm, most, cluster),
        )
    elif what == "map":
        result = bench_maps.maps(
            first, installation, accelerator, size_bytes=size_mib << 20, runs=runs
        )
    else:
        result = measure.copy(
            first, installation, accelerator, size_bytes=size_mib << 20, runs=runs
        )
    document = {
        "machine": measure.machine(),
        "qemu": installation.qemu.version,
        "accelerator": accelerator,
        "kernels": {name: k.release for name, k in installation.kernels.items()},
        "topologies": list(topologies),
        **result,
    }
    if plot is not None:
        plot.write_text(svg(what, document))
    print_json(f"testbed.bench.{what}/1", document)
    if result.get("grown") or result.get("wrong"):
        click.get_current_context().exit(ExitCode.FAIL)
