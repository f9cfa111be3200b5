# SPDX-License-Identifier: Apache-2.0
"""Verbs that show what runs said: as a page, and against one another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from testbed.errors import InputError
from testbed.verbs.common import format_option, print_json, say
from testbed.verbs.run_folders import complete_run, find_run

DEFAULT_FILE = "page.html"


@click.command()
@click.argument("run", required=False, shell_complete=complete_run)
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help=f"Where to, `-` for stdout; {DEFAULT_FILE} in the run folder if not given.",
)
@click.option(
    "--against",
    metavar="RUN",
    shell_complete=complete_run,
    help="Also show what changed since this earlier run.",
)
def page(run: str | None, output: Path | None, against: str | None) -> None:
    """Make one HTML file of the run folder RUN: verdicts, evidence, rack, peers, logs.

    Of a matrix's folder the table (index.html), and the page of each of its cells, again.

    RUN may be the beginning of its name, and is the newest if it is not given. The file needs
    nothing else and asks no network: open it from a disk, send it, print it. Prints its name.
    """
    from testbed.matrix import page as matrices
    from testbed.matrix.records import MATRIX_FILE
    from testbed.matrix.store import CELLS
    from testbed.page.render import render
    from testbed.results.record import write_atomically

    folder = find_run(run)
    name = DEFAULT_FILE
    if (folder / CELLS).is_dir() and not (folder / MATRIX_FILE).is_file():
        raise InputError(
            f"{folder} is of a matrix that has not ended",
            hint=f"go on with: testbed matrix FILE --resume {folder}",
        )
    if (folder / MATRIX_FILE).is_file():
        if against is not None:
            raise InputError("--against compares two runs, not matrices")
        name = matrices.PAGE_FILE
        text, problems = matrices.remake(folder)
        for problem in problems:
            say(f"no page of {problem}")
    else:
        text = render(folder, against=None if against is None else find_run(against))
    if output is not None and str(output) == "-":
        click.echo(text, nl=False)
        return
    target = output or folder / name
    try:
        write_atomically(target, text.encode(errors="replace"))
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from None
    say(f"{target} is written ({len(text) // 1024} KiB)")
    click.echo(target)


@click.command()
@click.argument("before", metavar="RUN_A", shell_complete=complete_run)
@click.argument("after", metavar="RUN_B", shell_complete=complete_run)
@format_option("text", "json")
def diff(before: str, after: str, form: str) -> int:
    """Say what changed from run folder RUN_A to RUN_B: verdicts, environment, figures.

    Exit codes: 0 no verdict changed (environment and figures may have), 1 some verdict is new,
    gone, broken, fixed or otherwise, 2 one of them is no run folder.
    """
    from testbed.page.load import load_run
    from testbed.results.changes import changes
    from testbed.results.changes_text import lines

    found = changes(load_run(find_run(before)).record, load_run(find_run(after)).record)
    if form == "json":
        print_json(
            "testbed.diff/1",
            {"before": str(before), "after": str(after), **dataclasses.asdict(found)},
        )
    else:
        click.echo("\n".join(lines(found)))
    return 0 if found.is_same else 1
