# SPDX-License-Identifier: Apache-2.0
"""Verbs about this machine: what it can do, and setting it up."""

from __future__ import annotations

import dataclasses

import click

from testbed.errors import ExitCode
from testbed.verbs.common import format_option, print_json

MARKS = {"ok": "ok  ", "warn": "WARN", "bad": "BAD "}


@click.command()
@click.option("--qemu", metavar="PATH", help="Another QEMU than the tool root's.")
@click.option("--fresh", is_flag=True, help="Probe again instead of using what is remembered.")
@format_option("text", "json")
def doctor(qemu: str | None, fresh: bool, form: str) -> int:
    """What this machine can do, and what to mend. Exit code 128 if racks cannot run here."""
    from testbed.host import probe

    findings = probe.doctor(qemu=qemu, fresh=fresh)
    if form == "json":
        print_json("testbed.doctor/1", {"findings": [dataclasses.asdict(f) for f in findings]})
    else:
        for finding in findings:
            click.echo(f"{MARKS[finding.status]} {finding.name}: {finding.detail}")
            if finding.hint:
                click.echo(f"     hint: {finding.hint}")
    bad = any(finding.status == "bad" for finding in findings)
    return ExitCode.ERROR if bad else ExitCode.PASS


@click.command()
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    metavar="NAME|PATH",
    help="Also make this kernel ready; may be given several times.",
)
@click.option("--mirror", metavar="URL", help="Debian mirror; else the host's own, or the default.")
@click.option("--locked", is_flag=True, help="Refuse packages other than the reviewed ones.")
@click.option("--refresh", is_flag=True, help="Ask the mirror again, even if all is made.")
@click.option("--update-lock", is_flag=True, help="Record what is used as the reviewed versions.")
@click.option("--qemu", metavar="PATH", help="Another QEMU; the tool root is then not made.")
@click.option(
    "--toolchain",
    is_flag=True,
    help="Also make ready what builds kernel modules for these kernels (otherwise: when needed).",
)
@click.option(
    "--virtme",
    is_flag=True,
    help="Also make ready what virtme-ng calls in `testbed bench` (otherwise: when needed).",
)
@click.option("--quiet", is_flag=True, help="Say nothing unless something is downloaded.")
@format_option("text", "json")
def setup(
    kernels: tuple[str, ...],
    mirror: str | None,
    locked: bool,
    refresh: bool,
    update_lock: bool,
    qemu: str | None,
    toolchain: bool,
    virtme: bool,
    quiet: bool,
    form: str,
) -> None:
    """Make the tool root (QEMU), the guest image and the kernel, in the user's cache.

    What is made already is left alone: a second set-up asks no mirror and takes no time.
    """
    from testbed import run_products
    from testbed.benchmarks import virtme as peer
    from testbed.host import prepare, probe
    from testbed.verbs.install import builders, install, options

    installation = install(
        [prepare.DEFAULT_KERNEL, *kernels], qemu=qemu, mirror=mirror, locked=locked, refresh=refresh
    )
    sets = dict(installation.packages)
    if toolchain:
        for builder in builders(installation.kernels, locked=locked, refresh=refresh):
            sets |= builder.packages
    if virtme:
        with options(mirror, locked, refresh) as setup_options:
            sets |= peer.prepare(setup_options)
    if update_lock:
        prepare.update_lock(sets)
    accelerator = probe.accelerator(installation)
    versions = run_products.versions_of(installation, accelerator)
    if form == "json":
        print_json("testbed.setup/1", {"versions": versions})
    elif not quiet:
        click.echo(f"QEMU {versions['qemu']} under {accelerator}")
        for name, kernel in versions["kernels"].items():
            click.echo(f"kernel {name}: {kernel['release']}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL; put it where your shell reads such scripts.

    For example: testbed completion bash > ~/.local/share/bash-completion/completions/testbed
    """
    from click.shell_completion import get_completion_class

    from testbed.verbs.group import cli

    maker = get_completion_class(shell)
    if maker is not None:
        click.echo(maker(cli, {}, "testbed", "_TESTBED_COMPLETE").source())
