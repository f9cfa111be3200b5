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
    run_folder,
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
    Or FILE is a bundle (`testbed bundle`, docs/bundles.md), of a report or of suites, which is
    replayed: what differs from where it was made is listed, and for suites REPRODUCED says that
    each requirement ended as it did there.

    Exit codes suit a bisection that builds first (docs/reports.md): 0 FIXED, 1 REPRODUCED,
    125 DIFFERENT, SKIP or LOST (skip this commit), 128 ERROR (stop). With --expect: 0 as expected,
    1 otherwise, 3 LOST, 125 SKIP, 128 ERROR. 2 is bad input. A bundle of suites in which nothing
    was bad is 0 if REPRODUCED.
    """
    from rich.console import Console

    from testbed import deploy
    from testbed.bundle import archive, tell
    from testbed.harness.sources import TopologySource
    from testbed.history.store import remember
    from testbed.reports import load, printing
    from testbed.reports.judge import Word
    from testbed.reports.outcome import record_of
    from testbed.reports.reproduce import Finding
    from testbed.reports.runner import run_reports
    from testbed.verbs.install import install
    from testbed.verbs.replaying import replay_bundle

    if only_list:
        for path in load.shipped_reports().values():
            case = load.load(path, {})
            click.echo(f"{case.name:28} {case.report.title}")
        return 0
    if not files:
        raise InputError("which report?", hint="FILE…, or --list for the shipped ones")
    overrides = load.Overrides(kernel, iommu_mode, engine, qemu)
    wanted = Word(expect.upper()) if expect else None
    if any(archive.is_bundle(Path(word)) for word in files):
        if len(files) > 1:
            raise InputError("a bundle is replayed alone", hint="one FILE")
        asked = tell.Wanted(parse_settings(settings), overrides, trust, wanted)
        return replay_bundle(Path(files[0]), asked, output, form)
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
    run_dir = run_folder(output, cases[0].name if len(cases) == 1 else "reports")
    say(f"run folder: {run_dir}")

    def source(case: load.Case, folder: Path) -> TopologySource:
        kernels = [node.kernel for node in case.topology.nodes.values()]
        installation = install(kernels, qemu=case.qemu)
        options = deploy.StartOptions(installation=installation, trust=trust)
        return TopologySource(case.topology, folder, options=options, say=say)

    def found(case: load.Case, finding: Finding) -> None:
        if form == "text":
            click.echo("\n".join(printing.lines(case, finding)))

    findings, code = run_reports(
        cases,
        run_dir,
        source,
        expect=wanted,
        command=sys.argv,
        say=say,
        found=found,
    )
    remember(run_dir, say)
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
