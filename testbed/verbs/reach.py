# SPDX-License-Identifier: Apache-2.0
"""Verbs that reach into a running rack: shell, console, QMP, logs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from testbed.errors import Diagnostic, InputError, QmpError
from testbed.verbs.common import format_option, print_json, rack_argument, say


@click.command(context_settings={"ignore_unknown_options": True})
@rack_argument(node=True)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--timeout",
    "timeout_s",
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long COMMAND may take.",
)
def ssh(rack: str, command: tuple[str, ...], timeout_s: float) -> int:
    """A shell in RACK[/NODE], or COMMAND there: its output and its exit status."""
    from testbed.guest.terminal import interact
    from testbed.rack import attach, split_name

    name, node = split_name(rack)
    with attach(name) as running:
        link = running.node(node).link
        if not command:
            size = shutil.get_terminal_size()
            return interact(link.shell(os.environ.get("TERM", "vt100"), size.columns, size.lines))
        # Several words are a command and its arguments; one is a line for the guest's shell.
        line = command[0] if len(command) == 1 else shlex.join(command)
        result = link.run(line, timeout_s=timeout_s)
        sys.stdout.buffer.write(result.stdout)
        sys.stdout.buffer.flush()
        sys.stderr.buffer.write(result.stderr)
        sys.stderr.buffer.flush()
        return result.exit_status


@click.command()
@rack_argument(node=True)
def console(rack: str) -> None:
    """The serial console of RACK[/NODE]; leave with Ctrl-]."""
    from testbed.machine.terminal import attach_console
    from testbed.rack import attach, split_name

    name, node = split_name(rack)
    with attach(name) as running:
        chosen = running.node(node)
        say(f"{name}/{chosen.name}: console; leave with Ctrl-]")
        end = attach_console(chosen.console_socket, node=chosen.name)
    say(f"console closed ({end.value})")


@click.command()
@rack_argument(node=True)
@click.argument("command")
@click.argument("arguments", default="{}", metavar="[JSON]")
def qmp(rack: str, command: str, arguments: str) -> None:
    """One QMP COMMAND to the QEMU of RACK[/NODE]; its answer as JSON."""
    from testbed.rack import attach, split_name

    try:
        given: Any = json.loads(arguments)
    except ValueError as error:
        raise InputError(
            diagnostics=[Diagnostic("JSON", 1, 1, f"{arguments!r}: {error}", "a JSON object")]
        ) from error
    if not isinstance(given, dict):
        raise InputError(
            diagnostics=[Diagnostic("JSON", 1, 1, f"{arguments!r} is no object", '{"id": "x"}')]
        )
    name, node = split_name(rack)
    with attach(name) as running:
        try:
            answer = running.node(node).qmp(command, **given)
        except QmpError as error:
            # What QEMU refuses here is what the user typed, not a fault of ours.
            raise InputError(error.message) from error
    click.echo(json.dumps(answer, indent=2))


@click.command()
@rack_argument(node=True)
@click.option("--follow", "-f", is_flag=True, help="Go on printing what is added; Ctrl-C ends.")
@click.option(
    "--what",
    type=click.Choice(["console", "qemu", "qmp", "observations", "keeper"]),
    default="console",
    show_default=True,
    help="Which log.",
)
@format_option("text", "json")
def logs(rack: str, follow: bool, what: str, form: str) -> None:
    """A log of RACK[/NODE]; with --format json, where all its logs are."""
    from testbed.machine.client import KEEPER_LOG
    from testbed.machine.command import CONSOLE_LOG, QEMU_LOG
    from testbed.rack import attach, split_name
    from testbed.rack_node import OBSERVATIONS_LOG, QMP_LOG

    name, node = split_name(rack)
    with attach(name) as running:
        chosen = running.node(node)
        files = {
            "console": chosen.log_dir / CONSOLE_LOG,
            "qemu": chosen.log_dir / QEMU_LOG,
            "qmp": chosen.log_dir / QMP_LOG,
            "observations": chosen.log_dir / OBSERVATIONS_LOG,
            "keeper": running.run_dir / KEEPER_LOG,
        }
        if form == "json":
            print_json("testbed.logs/1", {"rack": name, "files": files})
            return
        _print_log(files[what], follow, lambda: chosen.alive)


def _print_log(path: Path, follow: bool, alive: Any) -> None:
    if not path.exists():
        say(f"{path} is not there (nothing was logged)")
        return
    with path.open(errors="replace") as log:
        while True:
            last = not follow or not alive()
            shutil.copyfileobj(log, sys.stdout)
            sys.stdout.flush()
            if last:
                return
            time.sleep(0.2)
