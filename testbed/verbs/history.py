# SPDX-License-Identifier: Apache-2.0
"""The verb that tells what earlier runs said."""

from __future__ import annotations

import dataclasses
import json

import click

from testbed.errors import InputError
from testbed.verbs.common import format_option, print_json, say

_SHOWN = 20  # runs of one requirement in text
DEFAULT_ORIGIN = "testbed"


@click.command()
@click.argument("requirement", metavar="[REQ]", default="")
@click.option(
    "--kernel", metavar="TEXT", default="", help="Only runs whose kernel's release has it."
)
@click.option("-t", "--topology", metavar="NAME", default="", help="Only runs on this rack.")
@click.option(
    "--runs",
    type=click.IntRange(1, 2000),
    default=200,
    show_default=True,
    metavar="N",
    help="Look at the newest N runs that fit.",
)
@click.option("--broken", is_flag=True, help="Also runs with --break, which had to fail.")
@click.option(
    "--origin",
    default=DEFAULT_ORIGIN,
    show_default=True,
    metavar="NAME",
    help="kcidb: who submits the results.",
)
@format_option("text", "json", "kcidb")
def history(
    requirement: str,
    kernel: str,
    topology: str,
    runs: int,
    broken: bool,
    origin: str,
    form: str,
) -> None:
    """Tell what earlier runs said of requirement REQ (or a report's name), or of all.

    flaky: good and bad, there and back, on one kernel in one setting; broken, fixed: the newest
    against those before; new: only in the newest run. `testbed run` and `repro` write it, at most
    the newest 2000 runs (history.sqlite3 in the state folder). --format kcidb prints it for
    kernelci.org (schema 5.3).
    """
    from testbed.history import kcidb, store
    from testbed.history.trend import histories
    from testbed.topology.problem import nearest

    if not kcidb.ORIGIN.fullmatch(origin):
        raise InputError(f"--origin '{origin}': lower-case letters, digits and '_' only")
    file = store.default_file()
    found = store.read(
        file, say, name=requirement, kernel=kernel, topology=topology, broken=broken, runs=runs
    )
    if not found:
        every = store.read(file, say, broken=True)
        names = sorted({each.result.name for each in every})
        if requirement and names and requirement not in names:
            near = nearest(requirement, names)
            raise InputError(
                f"no run has said anything of '{requirement}'",
                hint=f"did you mean '{near}'?" if near else "`testbed history` lists all",
            )
    if form == "kcidb":
        click.echo(json.dumps(kcidb.document(found, origin), indent=2))
        return
    every_history = histories(found)
    if form == "json":
        rows = [
            {
                "name": each.name,
                "trend": each.trend,
                "why": each.why,
                "counts": each.counts,
                "runs": [
                    {**dataclasses.asdict(one.run), **dataclasses.asdict(one.result)}
                    for one in each.runs
                ]
                if requirement
                else len(each.runs),
            }
            for each in every_history
        ]
        print_json("testbed.history/1", {"file": str(file), "requirements": rows})
        return
    if not every_history:
        click.echo("no run that fits is remembered")
        return
    width = max(len(each.name) for each in every_history)
    for each in every_history:
        counts = ", ".join(f"{number} {verdict}" for verdict, number in each.counts.items())
        click.echo(f"{each.name:<{width}}  {each.trend:<11}  {counts}: {each.why}")
    if requirement:
        one = every_history[0]
        click.echo("")
        for line in reversed(one.runs[-_SHOWN:]):
            run, result = line.run, line.result
            where = ", ".join(word for word in (run.topology, run.iommu, run.kernel) if word)
            broke = f" --break {run.mutation}" if run.mutation not in ("", "none") else ""
            click.echo(f"  {run.started[:19]}  {result.verdict:<10}  {where}{broke}")
        if len(one.runs) > _SHOWN:
            click.echo(f"  and {len(one.runs) - _SHOWN} older ones (--format json has them)")
