# SPDX-License-Identifier: Apache-2.0
"""Verbs about racks that run: start, list, look at, end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from testbed.errors import InputError
from testbed.verbs.common import (
    format_option,
    load_topology,
    override_options,
    print_json,
    rack_argument,
    say,
    settings_option,
    trust_option,
    warm_option,
)

if TYPE_CHECKING:
    from testbed.machine.registry import RackInfo


@click.command()
@click.argument("file")
@click.option("--name", default="", help="The rack's name; the topology's own if not given.")
@settings_option
@override_options
@trust_option
@click.option("--qemu", metavar="PATH", help="Another QEMU than the tool root's.")
@click.option("--accel", type=click.Choice(["tcg", "kvm"]), help="Do not probe; use this.")
@click.option(
    "--append",
    "kernel_args",
    multiple=True,
    metavar="WORDS",
    help="More words for the guest kernel's command line.",
)
@click.option("--verbose-console", is_flag=True, help="The guest kernel logs to its console.")
@warm_option
@click.option(
    "--timeout",
    "timeout_s",
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the machines may take to answer.",
)
@format_option("text", "json")
def up(
    file: str,
    name: str,
    settings: tuple[str, ...],
    kernel: str | None,
    iommu_mode: str | None,
    trust: bool,
    qemu: str | None,
    accel: str | None,
    kernel_args: tuple[str, ...],
    verbose_console: bool,
    warm: bool,
    timeout_s: float,
    form: str,
) -> None:
    """Start the rack of topology FILE and leave it running.

    FILE may be the name of a shipped topology, or - for stdin. End it with `testbed down`.
    """
    from testbed import deploy
    from testbed.verbs.install import install_for

    topology = load_topology(file, settings, kernel=kernel, iommu_mode=iommu_mode, trust=trust)
    installation = install_for([topology], qemu=qemu)
    rack = deploy.start(
        topology,
        options=deploy.StartOptions(
            name=name,
            unique=False,
            detach=True,
            accelerator=accel,
            installation=installation,
            kernel_args=tuple(word for words in kernel_args for word in words.split()),
            verbose_console=verbose_console,
            warm=warm,
            again=warm,
            trust=trust,
            timeout_s=timeout_s,
        ),
        say=say,
    )
    with rack:
        if form == "json":
            print_json(
                "testbed.up/1",
                {"rack": rack.name, "nodes": list(rack.nodes), "run_dir": str(rack.run_dir)},
            )
        else:
            click.echo(f"{rack.name} is up: {', '.join(rack.nodes)} (logs in {rack.run_dir})")


@click.command()
@click.argument("racks", nargs=-1, metavar="RACK…", shell_complete=lambda *_: _names())
@click.option("--all", "every", is_flag=True, help="End every rack of this user.")
@click.option("--now", is_flag=True, help="Do not ask the guests first.")
def down(racks: tuple[str, ...], every: bool, now: bool) -> None:
    """End RACKs: guests are asked to power off, then QEMU is, then killed."""
    from testbed.host import paths
    from testbed.machine import registry

    if bool(racks) == every:
        raise InputError("name the racks to end, or give --all")
    base = paths.runtime_dir()
    # All names are looked up before the first rack ends: a typing error ends none.
    chosen = [info.name for info in registry.list_racks(base)] if every else list(racks)
    for name in chosen:
        registry.find(base, name)
    for name in chosen:
        click.echo(f"{name} is down ({_end(name, now)})")


def _end(name: str, now: bool) -> str:
    from testbed.errors import TestbedError
    from testbed.host import paths
    from testbed.machine import spawn
    from testbed.machine.lifecycle import StopDeadlines
    from testbed.rack import attach

    if not now:
        try:
            how = attach(name).stop(StopDeadlines())
            return ", ".join(f"{node} by {step}" for node, step in how.items())
        except TestbedError as error:
            # Whatever ails it, it must end.
            say(f"{name} does not end gently ({error.message}); killing it")
    if any(info.name == name for info in _infos()):
        spawn.end_rack(paths.runtime_dir(), name)
    return "killed"


def _infos() -> list[RackInfo]:
    from testbed.host import paths
    from testbed.machine import registry

    return registry.list_racks(paths.runtime_dir())


def _names() -> list[str]:
    return [info.name for info in _infos()]


def _summary(info: RackInfo) -> dict[str, Any]:
    record = info.record
    return {
        "name": info.name,
        "state": info.state.value,
        "nodes": list(record.nodes) if record else [],
        "age_s": max(0, round(time.time() - record.created_s)) if record else None,
        "detached": info.detached,
        "keeper_pid": info.keeper_pid,
        "run_dir": str(record.run_folder) if record else "",
        "processes": [dict(process) for process in info.processes],
    }


@click.command()
@format_option("text", "json")
def ps(form: str) -> None:
    """List this user's racks, as they are now."""
    rows = [_summary(info) for info in _infos()]
    if form == "json":
        print_json("testbed.ps/1", {"racks": rows})
        return
    if not rows:
        say("no rack runs")
        return
    lines = [("RACK", "STATE", "NODES", "AGE", "RUN FOLDER")]
    lines += [
        (
            r["name"],
            r["state"],
            ",".join(r["nodes"]),
            "" if r["age_s"] is None else f"{r['age_s']} s",  # it is only starting
            r["run_dir"],
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        click.echo("  ".join([*cells, line[4]]))


@click.command()
@rack_argument()
@format_option("json", default="json")
def inspect(rack: str, form: str) -> None:  # noqa: ARG001  (one form, for now)
    """Everything about RACK as JSON: state, versions, and where each function stands."""
    from testbed import run_products
    from testbed.host import paths
    from testbed.machine import registry
    from testbed.rack import attach, split_name

    name, _ = split_name(rack)
    info = registry.find(paths.runtime_dir(), name)
    with attach(name) as running:
        print_json(
            "testbed.inspect/1",
            {
                **_summary(info),
                "versions": running.versions,
                "topology": info.record.topology if info.record else None,
                "plan": run_products.plan_data(running.plan),
            },
        )
