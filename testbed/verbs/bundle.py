# SPDX-License-Identifier: Apache-2.0
"""The verb that makes a run one file, and shows what is in one."""

from __future__ import annotations

from pathlib import Path

import click

from testbed.errors import InputError
from testbed.verbs.common import format_option, print_json, say
from testbed.verbs.run_folders import complete_run, find_run


@click.command()
@click.argument("run", required=False, shell_complete=complete_run)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The bundle.  [default: the run folder's name with .testbed.zip, here]",
)
@click.option("--show", metavar="FILE", help="Say what is in a bundle; nothing of it is run.")
@format_option("text", "json")
def bundle(run: str | None, output: Path | None, show: str | None, form: str) -> int:
    """Make one file of the run in folder RUN: all that it takes to look at it and to replay it.

    RUN is the folder that `testbed run` or `testbed repro` named at its end, or the beginning of
    its name in the state folder; the newest if it is not given. The same run always gives the same
    bytes. `testbed repro FILE` replays it; index.html in it is the page to look at. docs/bundles.md
    says what is left out.

    Exit codes: 0, or 2 for bad input.
    """
    from testbed.bundle import archive, collect
    from testbed.bundle import show as shown

    if run is not None and show is not None:
        raise InputError("which of the two?", hint="RUN, to bundle it; or --show FILE, a bundle")
    if show is not None:
        found = archive.read(Path(show))
        if form == "json":
            print_json("testbed.bundle-show/1", shown.data(found))
        else:
            click.echo("\n".join(shown.lines(found)))
        return 0
    run_dir = find_run(run)
    listed, content = collect.bundle(run_dir)
    file = output or Path(f"{run_dir.resolve().name}{collect.SUFFIX}")
    try:
        collect.write(file, content)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from error
    for each in listed.left_out:
        say(f"left out: {each.name}: {each.why}")
    if form == "json":
        print_json("testbed.bundle/1", {"file": str(file), "size_bytes": len(content)})
    else:
        click.echo(f"{file} ({len(content)} bytes, {len(listed.members)} members)")
    return 0
