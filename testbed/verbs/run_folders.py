# SPDX-License-Identifier: Apache-2.0
"""The run that a user means: a folder, its name or the beginning of it, or the newest."""

from __future__ import annotations

from pathlib import Path

import click

from testbed.errors import Diagnostic, InputError


def run_names() -> list[str]:
    """The runs in the state folder, the newest first: their names begin with the time."""
    from testbed.host import paths

    runs = paths.state_dir() / "runs"
    return sorted((each.name for each in runs.iterdir()), reverse=True) if runs.is_dir() else []


def complete_run(_ctx: click.Context, _parameter: click.Parameter, word: str) -> list[str]:
    """For the shell's completion."""
    return [name for name in run_names() if name.startswith(word)]


def find_run(word: str | None) -> Path:
    """The folder meant by ``word``; if it is None, that of the newest run with a record: racks that
    were only brought up, and runs that have not ended, are in the same place without one.

    :raises InputError: there is none, or there are several; with the nearest name.
    """
    from testbed.host import paths
    from testbed.results.record import FILE_NAME
    from testbed.topology.problem import listing, nearest

    runs = paths.state_dir() / "runs"
    names = run_names()
    if word is None:
        if names:
            ended = (name for name in names if (runs / name / FILE_NAME).is_file())
            return runs / next(ended, names[0])
        raise InputError(f"no run yet in {runs}", hint="RUN may be the folder of one elsewhere")
    path = Path(word)
    if path.is_dir():
        return path
    found = [name for name in names if "/" not in word and word and name.startswith(word)]
    if word in names or len(found) == 1:
        return runs / (word if word in names else found[0])
    if found:
        raise InputError(diagnostics=[Diagnostic(word, 0, 0, "several runs", listing(found))])
    expected = f"a folder, or the name of one in {runs}"
    near = nearest(word, names)
    message = "is no folder" if path.exists() else "no such run"
    raise InputError(diagnostics=[Diagnostic(word, 0, 0, message, expected, near)])
