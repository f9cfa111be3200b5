# SPDX-License-Identifier: Apache-2.0
"""The verb about saved machines: what is kept, and making room."""

from __future__ import annotations

import time

import click

from testbed.verbs.common import format_option, print_json, say


@click.group()
def cache() -> None:
    """Machines that were saved for `--warm`: list them, make room."""


@cache.command("show")
@format_option("text", "json")
def show(form: str) -> None:
    """List the saved machines, the most recently used first."""
    from testbed.warm import restore
    from testbed.warm.store import entry_data

    entries = restore.store().kept()
    if form == "json":
        print_json("testbed.cache/1", {"saved": [entry_data(entry) for entry in entries]})
        return
    if not entries:
        say("no machine is saved")
    for entry in entries:
        age_min = (time.time() - entry.used_s) / 60
        size_mib = entry.size_bytes / (1 << 20)
        click.echo(f"{entry.key}  {size_mib:6.0f} MiB  {age_min:6.0f} min ago  {entry.names}")


@cache.command("prune")
@click.option(
    "--keep",
    "keep_mib",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="MIB",
    help="Keep so much of what was used last.",
)
@format_option("text", "json")
def prune(keep_mib: int, form: str) -> None:
    """Remove saved machines, the least recently used first, and what killed saves left."""
    from testbed.warm import restore
    from testbed.warm.store import entry_data

    gone = restore.store().prune(keep_mib << 20)
    if form == "json":
        print_json("testbed.cache.prune/1", {"removed": [entry_data(entry) for entry in gone]})
        return
    freed_mib = sum(entry.size_bytes for entry in gone) / (1 << 20)
    click.echo(f"removed {len(gone)} saved machine(s), {freed_mib:.0f} MiB")
