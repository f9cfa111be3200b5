# SPDX-License-Identifier: Apache-2.0
"""The verb that measures the testbed itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.errors import ExitCode, InputError
from testbed.verbs.common import (
    engine_option,
    load_topology,
    override_options,
    print_json,
    say,
    settings_option,
    trust_option,
)

if TYPE_CHECKING:
    from testbed.host.prepare import Installation
    from testbed.topology.model import Topology

IDLE_S = 10
GROWTH = ("render", "gpus", "racks", "cells")
WHAT = (
    *("boot", "memory", "copy", "latency", "idle", "map", "cycles"),
    *("suite", *GROWTH, "figures"),
)


@dataclass(frozen=True)
class _Peers:
    """What `boot` is compared with: a command of the user's, a program that we know."""

    command: str
    against: str | None


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
    "--only",
    multiple=True,
    metavar="NAME",
    help="`figures`: measure this one; may be given several times. `every`: all of them.",
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
    only: tuple[str, ...],
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
    figures: what the project promises, and whether it holds here: exit code 0 if all that was
    measured does, 1 if one does not, 125 or 128 if one that was asked for cannot be measured.

    What is compared is measured in turns, in one run: quote the ratios.
    """
    from testbed.benchmarks import cycles as bench_cycles
    from testbed.benchmarks import figures, growth
    from testbed.benchmarks import machines as measure
    from testbed.benchmarks import maps as bench_maps
    from testbed.benchmarks import suite as bench_suite
    from testbed.benchmarks.plot import svg
    from testbed.host import probe
    from testbed.verbs.install import install_for

    named = figures.chosen(only)
    if what == "figures" and (files or settings or kernel or iommu_mode or engine):
        raise InputError("figures say themselves what they are measured on", hint="--only NAME")
    topologies = {
        file: load_topology(
            file, settings, kernel=kernel, iommu_mode=iommu_mode, engine=engine, trust=trust
        )
        for file in files or ("quad-gpu",)
    }
    first = next(iter(topologies.values()))
    installation = install_for(topologies.values())
    accelerator = probe.accelerator(installation)
    on = (installation, accelerator)
    suite_words = [*(suites or ("p2p-iommu",)), *(w for f in topologies for w in ("-t", f))]
    size_bytes = size_mib << 20
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "boot": lambda: _boot(topologies, *on, runs, warm, _Peers(peer, against)),
        "memory": lambda: measure.memory(first, *on, racks=racks, warm=warm),
        "copy": lambda: measure.copy(first, *on, size_bytes=size_bytes, runs=runs),
        "latency": lambda: measure.latency(first, *on, runs=runs),
        "idle": lambda: measure.idle(first, *on, seconds=IDLE_S),
        "map": lambda: bench_maps.maps(first, *on, size_bytes=size_bytes, runs=runs),
        "cycles": lambda: bench_cycles.booted(first, *on, count=count),
        "suite": lambda: bench_suite.cost([*suite_words, *["--warm"][: int(warm)]], runs=runs),
        "figures": lambda: _figures(first, *on, runs, named),
    }
    extent = growth.Extent(runs, warm, most, cluster)
    ways |= {name: functools.partial(growth.measure, name, first, *on, extent) for name in GROWTH}
    result = ways[what]()
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
    if what == "figures":
        click.get_current_context().exit(figures.exit_code(result))
    if result.get("grown") or result.get("wrong"):
        click.get_current_context().exit(ExitCode.FAIL)


def _figures(
    topology: Topology,
    installation: Installation,
    accelerator: str,
    runs: int,
    names: Sequence[str],
) -> dict[str, Any]:
    from testbed.benchmarks import figures, promised
    from testbed.benchmarks.commands import Commands
    from testbed.verbs.install import options

    with options() as setup, Commands() as commands:
        bed = promised.Bed(commands, topology, installation, accelerator, setup, runs, say)
        return figures.report(names, bed)


def _boot(
    topologies: dict[str, Topology],
    installation: Installation,
    accelerator: str,
    runs: int,
    warm: bool,
    words: _Peers,
) -> dict[str, Any]:
    from testbed.benchmarks import machines, virtme
    from testbed.verbs.install import options

    peers: dict[str, Callable[[], float]] = {}
    if words.command:
        peers["peer"] = lambda: machines.command_seconds(words.command)
    if words.against:
        with options() as setup:
            kernel = next(iter(installation.kernels))
            found = virtme.Peer.of(kernel, installation, accelerator, setup)
        peers[words.against] = lambda: found.run().ran_s
    return machines.boot(topologies, installation, accelerator, runs=runs, peers=peers, warm=warm)
