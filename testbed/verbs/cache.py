# SPDX-License-Identifier: Apache-2.0
"""The verb about saved machines: what is kept, and making room."""

from __future__ import annotations

import time

import click

from testbed.verbs.common import format_option, print_json, say


@click.command()
@click.argument("what", type=click.Choice(["show", "prune"]))
@click.option(
    "--keep",
    "keep_mib",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="MIB",
    help="`prune`: keep so much of what was used last.",
)
@format_option("text", "json")
def cache(what: str, keep_mib: int, form: str) -> None:
    """`show` the machines that were saved for --warm; `prune` them, the least recently used first.

    8 GiB of them are kept without being asked.
    """
    from testbed.warm import restore
    from testbed.warm.store import entry_data

    store = restore.store()
    entries = store.kept() if what == "show" else store.prune(keep_mib << 20)
    if form == "json":
        print_json(f"testbed.cache.{what}/1", {"saved": [entry_data(entry) for entry in entries]})
        return
    for entry in entries:
        # A clock that was put back leaves times that are to come.
        age_min = max(0.0, time.time() - entry.used_s) / 60
        size_mib = entry.size_bytes / (1 << 20)
        click.echo(f"{entry.key}  {size_mib:6.0f} MiB  {age_min:6.0f} min ago  {entry.names}")
    total_mib = sum(entry.size_bytes for entry in entries) / (1 << 20)
    verb = "saved" if what == "show" else "removed"
    say(f"{len(entries)} machine(s) {verb}, {total_mib:.0f} MiB")
