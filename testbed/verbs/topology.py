# SPDX-License-Identifier: Apache-2.0
"""Verbs about topology files; none of them starts anything."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import click

from testbed.errors import Diagnostic, InputError
from testbed.verbs.common import (
    find_topology,
    format_option,
    load_topology,
    override_options,
    parse_settings,
    print_json,
    settings_option,
)


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@settings_option
@format_option("text", "json")
def validate(files: tuple[str, ...], settings: tuple[str, ...], form: str) -> int:
    """Say what is wrong with topology FILEs, all of it, and where.

    A FILE may be a folder (every *.yaml in it), the name of a shipped topology, or - for stdin.
    """
    from testbed.topology import load, placement

    chosen = parse_settings(settings)
    rows: list[dict[str, object]] = []
    wrong = False
    for file in _expand(files):
        diagnostics: tuple[Diagnostic, ...] = ()
        message = ""
        try:
            placement.place(load.load(find_topology(file), chosen))
        except InputError as error:
            diagnostics, message, wrong = error.diagnostics, str(error), True
        rows.append(
            {
                "file": str(file),
                "valid": not message,
                "diagnostics": [d._asdict() for d in diagnostics],
            }
        )
        if form == "text":
            click.echo(message or f"{file}: valid")
    if form == "json":
        print_json("testbed.validate/1", {"files": rows})
    return 2 if wrong else 0


def _expand(files: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for file in files:
        folder = Path(file)
        inside = sorted(map(str, folder.glob("*.yaml"))) if folder.is_dir() else [file]
        if not inside:
            # Silence and exit code 0 would read as "all of it is valid".
            raise InputError(diagnostics=[Diagnostic(file, 0, 0, "no *.yaml is in this folder")])
        found += inside
    return found


@click.command()
@click.argument("file")
@settings_option
@override_options
@format_option("tree", "argv", "json", default="tree")
def plan(
    file: str, settings: tuple[str, ...], kernel: str | None, iommu_mode: str | None, form: str
) -> None:
    """Show what FILE would become: the PCI tree, the QEMU command lines, or everything as JSON.

    Nothing is started, and nothing need be set up: where the command line would name this host's
    own files, it says KERNEL and INITRD.
    """
    from testbed.machine import argv
    from testbed.machine.command import LaunchContext
    from testbed.topology import drawing, model, placement

    topology = load_topology(file, settings, kernel=kernel, iommu_mode=iommu_mode)
    placed = placement.place(topology)
    if form == "tree":
        click.echo(drawing.tree(placed))
        return
    context = LaunchContext(
        qemu=("qemu-system-x86_64",),
        environment={},
        accelerator="tcg",
        kernel=Path("KERNEL"),
        initrd=Path("INITRD"),
        quick_firmware="qboot.rom",
    )
    commands = {
        name: argv.command(node, topology.nodes[name], context)
        for name, node in placed.nodes.items()
    }
    if form == "argv":
        for command in commands.values():
            click.echo(f"# {command.node}\n{_shell_lines(command.argv)}")
        return
    print_json(
        "testbed.plan/1",
        {
            "topology": model.to_data(topology),
            "nodes": {
                name: {
                    "functions": [
                        {
                            **json.loads(json.dumps(dataclasses.asdict(f), default=dict)),
                            "bdf": f.bdf,
                        }
                        for f in node.functions
                    ],
                    "argv": list(commands[name].argv),
                    "memory": [dataclasses.asdict(m) for m in commands[name].memory],
                }
                for name, node in placed.nodes.items()
            },
        },
    )


def _shell_lines(words: tuple[str, ...]) -> str:
    """One option and its value a line, ready to be pasted into a shell."""
    lines: list[str] = []
    for word in words:
        if word.startswith("-") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return " \\\n  ".join(lines)


@click.command()
@click.argument("what", type=click.Choice(["topology", "report", "matrix"]), default="topology")
def schema(what: str) -> None:
    """Print the JSON Schema of topology files, bug reports or matrix files, for an editor."""
    from testbed.topology import schema as schemas

    document = schemas.json_schema()
    if what == "report":
        from testbed.reports import reference as reports

        document = reports.json_schema()
    elif what == "matrix":
        from testbed.matrix import reference as matrices

        document = matrices.json_schema()
    click.echo(json.dumps(document, indent=2))
