# SPDX-License-Identifier: Apache-2.0
"""`testbed repro` of a bundle: what differs, what came out, and where the rest is."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from testbed.bundle import archive, replay, tell
from testbed.bundle.compare import Difference
from testbed.reports import printing
from testbed.results.ktap import one_line
from testbed.verbs.common import print_json, run_folder, say
from testbed.verbs.install import install_for

_SHOWN_WORDS = 12  # of command lines that differ; the run folder has all


def replay_bundle(file: Path, wanted: tell.Wanted, output: Path | None, form: str) -> int:
    """Replay the bundle and print how it went; returns the exit code."""
    told = tell.tell(archive.read(file), wanted)
    run_dir = run_folder(output, f"replay-{told.topology.rack}")
    say(f"run folder: {run_dir}")
    text = form == "text"
    if text:
        click.echo(f"bundle {one_line(str(file))}: {one_line(told.word)}")

    def differs(each: Difference) -> None:
        if text:
            click.echo(f"  differs: {one_line(str(each))}")

    done = replay.replay(
        told,
        run_dir,
        wanted,
        lambda topology, qemu: install_for([topology], qemu=qemu),
        command=tuple(sys.argv),
        say=say,
        differs=differs,
    )
    if form == "json":
        print_json(
            "testbed.replay/1",
            {
                "exit_code": int(done.code),
                "run_dir": str(run_dir),
                "word": done.word,
                "reason": done.reason,
                "bundle": told.word,
                "differences": [dataclasses.asdict(each) for each in done.differences],
                "changes": [dataclasses.asdict(each) for each in done.changes],
                "commands": list(done.commands),
            },
        )
        return done.code
    for line in done.commands[:_SHOWN_WORDS]:
        click.echo(f"  differs: {one_line(line)}")
    if len(done.commands) > _SHOWN_WORDS:
        more = len(done.commands) - _SHOWN_WORDS
        click.echo(f"  differs: {more} more words of command lines: {run_dir / replay.ARGV_DIFF}")
    if done.finding is not None and told.case is not None:
        click.echo("\n".join(printing.lines(told.case, done.finding)))
    else:
        click.echo(f"{done.word}: {one_line(done.reason)}")
        for change in done.changes:
            click.echo(f"  {one_line(str(change))}")
    say(f"exit {int(done.code)}; everything is in {run_dir}")
    return done.code
