# SPDX-License-Identifier: Apache-2.0
"""The verb that measures page faults."""

from __future__ import annotations

import click

from testbed.errors import InputError
from testbed.verbs.common import (
    format_option,
    load_topology,
    override_options,
    print_json,
    settings_option,
    trust_option,
)

DEFAULT_TOPOLOGY = "quad-gpu"


@click.command()
@click.option(
    "-t",
    "--topology",
    metavar="FILE",
    help="Boot this rack; a file or a shipped name. Its GPUs and NICs are models.  "
    f"[default: {DEFAULT_TOPOLOGY}]",
)
@click.option("--rack", metavar="NAME", help="Use a rack that is up, and leave it running.")
@settings_option
@override_options
@trust_option
@click.option("--count", default=200, show_default=True, help="So many faults of each kind.")
@format_option("text", "json")
def faultlat(
    topology: str | None,
    rack: str | None,
    settings: tuple[str, ...],
    kernel: str | None,
    iommu_mode: str | None,
    trust: bool,
    count: int,
    form: str,
) -> None:
    """How long page faults of devices take that the agent answers: histograms.

    One for each kind of device and each place where the page is: its own video memory, system
    memory, a peer over PCIe, a peer over a private link; 4 KiB and 2 MiB pages; polled and by
    interrupt. `seen`: until the agent has the fault; `serviced`: until the page is mapped; `done`:
    until the access is there; all on the guest's clock, and beside it the device's own word.

    They are measured in turns: compare what one call has printed.
    """
    from testbed.benchmarks import faults as measured
    from testbed.benchmarks import machines
    from testbed.host import probe
    from testbed.rack import attach
    from testbed.verbs.install import install_for

    if rack:
        if topology or settings or kernel or iommu_mode:
            raise InputError(
                "--rack uses a rack as it is; -t, -s, --kernel and --iommu boot another"
            )
        measured.check(count)
        with attach(rack) as running:
            result = measured.measure(running, count)
        where = {"rack": rack}
    else:
        wanted = load_topology(
            topology or DEFAULT_TOPOLOGY,
            settings,
            kernel=kernel,
            iommu_mode=iommu_mode,
            engine="model",
            trust=trust,
        )
        measured.check(count)
        installation = install_for([wanted])
        accelerator = probe.accelerator(installation)
        result = measured.faults(wanted, installation, accelerator, count=count)
        where = {
            "rack": wanted.rack,
            "qemu": installation.qemu.version,
            "accelerator": accelerator,
        }
    if form == "text":
        click.echo(measured.text(result))
        return
    print_json("testbed.faultlat/1", {"machine": machines.machine(), **where, **result})
