# SPDX-License-Identifier: Apache-2.0
"""The verb that makes a bug report happen again."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from testbed.errors import Diagnostic, InputError
from testbed.verbs.common import (
    engine_option,
    format_option,
    override_options,
    parse_settings,
    print_json,
    say,
    settings_option,
    trust_option,
)


@click.command()
@click.argument("files", nargs=-1, metavar="FILE…")
@settings_option
@override_options
@engine_option()
@trust_option
@click.option("--qemu", metavar="PATH", help="Another QEMU than the tool root's.")
@click.option(
    "--expect",
    type=click.Choice(["reproduced", "fixed"]),
    help="What must come out: exit code 0 if it does, 1 if it does not.",
)
@click.option(
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The run folder; a fresh one in the state folder if not given.",
)
@format_option("text", "json")
@click.option("--list", "only_list", is_flag=True, help="List the shipped reports, and run none.")
def repro(
    files: tuple[str, ...],
    settings: tuple[str, ...],
    kernel: str | None,
    iommu_mode: str | None,
    engine: str | None,
    trust: bool,
    qemu: str | None,
    expect: str | None,
    output: Path | None,
    form: str,
    only_list: bool,
) -> int:
    """Make the bugs in report FILEs happen again, and say REPRODUCED, FIXED or DIFFERENT.

    A FILE is a *.report.yaml (docs/reports.md), a folder of them, or the name of a shipped one
    (--list). SKIP names a missing capability, LOST a machine that died otherwise than reported.

    Exit codes suit a bisection that builds first (docs/reports.md): 0 FIXED, 1 REPRODUCED,
    125 DIFFERENT, SKIP or LOST (skip this commit), 128 ERROR (stop). With --expect: 0 as expected,
    1 otherwise, 3 LOST, 125 SKIP, 128 ERROR. 2 is bad input.
    """
    from rich.console import Console

    from testbed import deploy
    from testbed.harness.sources import TopologySource
    from testbed.reports import load, printing
    from testbed.reports.judge import Word
    from testbed.reports.outcome import record_of
    from testbed.reports.reproduce import Finding
    from testbed.reports.runner import run_reports
    from testbed.verbs.install import install

    if only_list:
        for path in load.shipped_reports().values():
            case = load.load(path, {})
            click.echo(f"{case.name:28} {case.report.title}")
        return 0
    if not files:
        raise InputError("which report?", hint="FILE…, or --list for the shipped ones")
    overrides = load.Overrides(kernel, iommu_mode, engine, qemu)
    cases: list[load.Case] = []
    wrong: list[Diagnostic] = []
    for path in [path for word in files for path in load.find_reports(word)]:
        try:
            cases.append(
                load.load(path, parse_settings(settings), overrides=overrides, trust=trust)
            )
        except InputError as error:
            if not error.diagnostics:
                raise
            wrong += error.diagnostics
    if wrong:
        raise InputError(diagnostics=wrong)
    run_dir = output or deploy.new_run_dir(cases[0].name if len(cases) == 1 else "reports")
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the run folder {run_dir}: {error.strerror}") from error
    say(f"run folder: {run_dir}")

    def source(case: load.Case, folder: Path) -> TopologySource:
        kernels = [node.kernel for node in case.topology.nodes.values()]
        installation = install(kernels, qemu=case.qemu)
        options = deploy.StartOptions(installation=installation, trust=trust)
        return TopologySource(case.topology, folder, options=options, say=say)

    def found(case: load.Case, finding: Finding) -> None:
        if form == "text":
            click.echo("\n".join(printing.lines(case, finding)))

    wanted = Word(expect.upper()) if expect else None
    findings, code = run_reports(
        cases,
        run_dir,
        source,
        expect=wanted,
        command=sys.argv,
        say=say,
        found=found,
    )
    if form == "json":
        records = [record_of(*pair, wanted) for pair in zip(cases, findings, strict=True)]
        print_json(
            "testbed.repro/1",
            {
                "exit_code": int(code),
                "run_dir": str(run_dir),
                "reports": [dataclasses.asdict(each) for each in records],
            },
        )
    printing.print_table(
        list(zip(cases, findings, strict=True)), run_dir, code, Console(stderr=True)
    )
    return code
