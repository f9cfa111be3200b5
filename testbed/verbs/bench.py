# SPDX-License-Identifier: Apache-2.0
"""The verb that measures the testbed itself."""

from __future__ import annotations

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
WHAT = ("boot", "memory", "copy", "latency", "idle", "map", "cycles")


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
) -> None:
    """Measure the testbed itself, as JSON with the machine it was measured on.

    boot: command to agent's hello. memory: of the host. copy: VRAM to VRAM, against no IOMMU and
    against memcpy. latency: a model's doorbell to its fence. idle: what models use for nothing.
    cycles: does anything grow when buffers are attached, mapped, moved and unmapped for ever?
    map: what mapping video memory for a peer costs the guest's kernel, by page and at once.

    What is compared is measured in turns, in one run: quote the ratios.
    """
    from testbed.benchmarks import cycles as bench_cycles
    from testbed.benchmarks import machines as measure
    from testbed.benchmarks import maps as bench_maps
    from testbed.host import probe
    from testbed.verbs.install import install_for

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
    elif what == "map":
        result = bench_maps.maps(
            first, installation, accelerator, size_bytes=size_mib << 20, runs=runs
        )
    else:
        result = measure.copy(
            first, installation, accelerator, size_bytes=size_mib << 20, runs=runs
        )
    print_json(
        f"testbed.bench.{what}/1",
        {
            "machine": measure.machine(),
            "qemu": installation.qemu.version,
            "accelerator": accelerator,
            "kernels": {name: k.release for name, k in installation.kernels.items()},
            "topologies": list(topologies),
            **result,
        },
    )
    if result.get("grown") or result.get("wrong"):
        click.get_current_context().exit(ExitCode.FAIL)
