# SPDX-License-Identifier: Apache-2.0
"""The verb that runs many."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from testbed.errors import InputError
from testbed.verbs.common import format_option, parse_settings, say, settings_option, trust_option


@click.command()
@click.argument("file", metavar="FILE")
@settings_option
@trust_option
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="At most N cells at once; never more than memory and processors allow.  [default: as "
    "many as processors]",
)
@click.option(
    "--cluster",
    default="",
    metavar="ADDRESS",
    help="Run the cells on a Dask cluster: tcp://HOST:PORT, or local[:N] for N workers here.",
)
@click.option(
    "--worker-timeout",
    "worker_wait_s",
    type=click.FloatRange(1, 86400),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="How long a cluster may be without a worker or a scheduler.",
)
@click.option(
    "--resume",
    metavar="RUN",
    help="Go on with an earlier run: its folder, its name, or `last`, the newest of this matrix. "
    "What ended there is kept.",
)
@click.option(
    "--only-failed",
    is_flag=True,
    help="Of --resume (`last` if not given): what ended FAIL, LOST or ERROR runs again.",
)
@click.option(
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The run's folder; a fresh one in the state folder if not given.",
)
@click.option("--list", "only_list", is_flag=True, help="List the cells, and run none.")
@format_option("text", "json", "junit")
def matrix(
    file: str,
    settings: tuple[str, ...],
    trust: bool,
    jobs: int | None,
    cluster: str,
    worker_wait_s: float,
    resume: str | None,
    only_failed: bool,
    output: Path | None,
    only_list: bool,
    form: str,
) -> int:
    """Run every cell of a matrix FILE (*.matrix.yaml, or a shipped name): one table, one page.

    A cell is one suite on one rack with one kernel, IOMMU, CPU model, QEMU and engine, and ends as
    a run does; one that cannot run here is SKIP, with the reason. The run's folder has the page
    (index.html), JSON, JUnit XML, and each cell's logs. A run that was killed is taken up again
    with --resume. docs/matrix.md has the file format, and clusters.
    """
    from rich.console import Console

    from testbed.history.store import remember
    from testbed.matrix import connection, junit, load, records, store, table
    from testbed.matrix.drive import How, drive
    from testbed.matrix.needs import room_here

    if resume and output:
        raise InputError("--resume goes on in its own folder; --output names a new one")
    if jobs and cluster:
        raise InputError(
            "-j is for this machine; a cluster has as many cells at once as workers",
            hint="--cluster local:N",
        )
    if cluster:
        connection.parse(cluster)
        connection.need_dask()
    plan = load.load(load.find(file), parse_settings(settings), trust=trust)
    if only_list:
        for cell in plan.cells:
            click.echo(f"{cell.name}  SKIP: {cell.skip}" if cell.skip else cell.name)
        return 0
    if only_failed or resume:
        folder = store.find_run(resume or store.LAST, plan.matrix.matrix)
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = output or store.new_run(f"{stamp}-{plan.matrix.matrix}")
    say(f"{len(plan.cells)} cells; run folder: {folder}")
    how = How(
        room_here(jobs),
        cluster=cluster,
        only_failed=only_failed,
        worker_wait_s=worker_wait_s,
        command=sys.argv,
    )
    done = drive(plan, store.Store(folder.absolute(), lambda run: remember(run, say)), how)
    if form == "json":
        click.echo(records.to_json(done).decode(), nl=False)
    elif form == "junit":
        click.echo(junit.to_junit(done, folder).decode(), nl=False)
    elif done.cells:
        table.print_table(done, Console(width=None if sys.stdout.isatty() else 200))
    say(table.summary(done, folder))
    if done.missing:
        say(f"go on with: testbed matrix {file} --resume {folder}")
    return done.exit_code
