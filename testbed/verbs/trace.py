# SPDX-License-Identifier: Apache-2.0
"""The verb that tells what the protocol core did in a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from testbed.errors import InputError
from testbed.verbs.common import format_option, print_json, say
from testbed.verbs.run_folders import complete_run, find_run


@click.command()
@click.argument("run", required=False, shell_complete=complete_run)
@format_option("text", "json", "perfetto")
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to; stdout if not given.",
)
def trace(run: str | None, form: str, output: Path | None) -> None:
    """What the protocol core did in RUN: each negotiation, move, fence and fault, with its time,
    what made it happen and what it is a part of.

    RUN is a run folder or the beginning of its name; the newest that has such events if it is not
    given. They come from the suites p2p-negotiation and p2p-fabric. Format perfetto is Chrome's
    trace event format: open the file at https://ui.perfetto.dev or chrome://tracing.
    """
    from testbed.host import paths
    from testbed.results import trace as traces
    from testbed.results import trace_perfetto, trace_text

    folder = traces.newest(paths.state_dir() / "runs") if run is None else find_run(run)
    if run is None:
        say(f"the newest run with protocol events: {folder}")
    rooms = traces.read(folder)
    if form == "text":
        text = "\n".join(trace_text.lines(rooms))
    elif form == "perfetto":
        text = json.dumps(trace_perfetto.document(rooms, folder.name), allow_nan=False) + "\n"
    else:
        body = {"run": str(folder), "rooms": [asdict(room) for room in rooms]}
        if output is None:
            print_json("testbed.trace/1", body)
            return
        text = json.dumps({"format": "testbed.trace/1", **body}, indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from None
    say(f"{output} is written")
