# SPDX-License-Identifier: Apache-2.0
"""The verb that judges."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.errors import InputError
from testbed.verbs.common import (
    engine_option,
    load_topology,
    override_options,
    parse_settings,
    run_folder,
    say,
    settings_option,
    trust_option,
    warm_option,
)
from testbed.verbs.payload import PayloadWords, payload_options

if TYPE_CHECKING:
    from testbed.harness.report_items import ReportOptions

DEFAULT_TOPOLOGY = "quad-gpu"
NEGOTIATION = "p2p-negotiation"


@click.command()
@click.argument("suites", nargs=-1, metavar="[SUITE…]")
@click.option(
    "-t",
    "--topology",
    "topologies",
    multiple=True,
    metavar="FILE",
    help="Boot this rack; a file or a shipped name. Several: every suite runs on each.  [default: "
    f"{DEFAULT_TOPOLOGY}]",
)
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Each suite on each rack (with each engine) apart, at most N at once; never more than "
    "memory and processors allow.",
)
@click.option("--rack", metavar="NAME", help="Use a rack that is up, and leave it running.")
@click.option(
    "-k",
    "keyword",
    default="",
    metavar="EXPR",
    help="Only tests whose name matches, as in pytest; their gates run too.",
)
@settings_option
@override_options
@engine_option("all")
@trust_option
@warm_option
@click.option(
    "--pristine",
    is_flag=True,
    help="Give each test a machine that no other has used: one is restored (--warm) meanwhile.",
)
@payload_options
@click.option("--qemu", metavar="PATH", help="Another QEMU than the tool root's.")
@click.option(
    "--break",
    "mutation",
    default="none",
    metavar="WHAT",
    help="Break the mapping code on purpose, to see a FAIL: skip-unmap, bar-address, …",
)
@click.option(
    "--policy",
    default="",
    metavar="POLICY",
    help="`p2p-negotiation`: choose interconnects by the rule of that proposal: best-quality (the "
    "default), exporter-priority, mailing-list, private-first.",
)
@click.option(
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The run folder; a fresh one in the state folder if not given.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["ktap", "json"]),
    default="ktap",
    show_default=True,
    help="What to print on stdout.",
)
@click.option("--no-history", is_flag=True, help="Keep this run out of `testbed history`.")
@click.option("--list", "only_list", is_flag=True, help="List the suites, and run none.")
def run(
    suites: tuple[str, ...],
    topologies: tuple[str, ...],
    jobs: int | None,
    rack: str | None,
    keyword: str,
    settings: tuple[str, ...],
    kernel: str | None,
    iommu_mode: str | None,
    engine: str | None,
    trust: bool,
    warm: bool,
    pristine: bool,
    words: PayloadWords,
    qemu: str | None,
    mutation: str,
    policy: str,
    output: Path | None,
    form: str,
    no_history: bool,
    only_list: bool,
) -> int:
    """Run conformance SUITEs (p2p-iommu if none is named) and say PASS, FAIL, SKIP, LOST, ERROR.

    A SUITE is a shipped one by its name (--list), `all`, a pytest file of your own, or a bug
    report (*.report.yaml; it passes if FIXED, and -s sets its own vars). `kselftest` runs the
    kernel's own selftests, as your checkout built them (docs/kselftest.md), `kvm-unit-tests`
    programs that take the kernel's place (docs/kvm-unit-tests.md). KTAP goes to stdout, a
    table to stderr, and the run folder keeps the record, JUnit XML, logs and every
    stage's product. With -j, or several -t, each suite has a rack of its own, and -j 1 says the
    same as -j 8.
    """
    from testbed.harness import shipped
    from testbed.instruments.mutations import parse_mutation
    from testbed.instruments.negotiation_rules import parse_policy

    known = (*shipped.SUITES, *shipped.PAYLOAD_SUITES, shipped.ALL_SUITES)
    if only_list:
        for name in (*shipped.SUITES, *shipped.PAYLOAD_SUITES):
            click.echo(name)
        return 0
    if rack and (topologies or jobs or settings or kernel or iommu_mode or engine or pristine):
        raise InputError(
            "--rack uses a rack as it is; -t, -j, -s, --kernel, --iommu, --engine and --pristine"
            " boot another"
        )
    chosen, rule = parse_mutation(mutation), parse_policy(policy)
    judged = {word for word in suites or (shipped.DEFAULT_SUITE,) if word in shipped.SUITES}
    if rule and judged and NEGOTIATION not in judged and shipped.ALL_SUITES not in suites:
        raise InputError(f"--policy is of the suite {NEGOTIATION}", hint="name that suite")
    if jobs or len(topologies) > 1:
        from testbed.verbs.apart import run_apart

        return run_apart(
            click.get_current_context(),
            suites or (shipped.DEFAULT_SUITE,),
            topologies or (DEFAULT_TOPOLOGY,),
            run_dir=run_folder(output, "several" if len(topologies) > 1 else "apart"),
            form=form,
            settings=settings,
            kernel=kernel,
            iommu_mode=iommu_mode,
            engine=engine,
            trust=trust,
        )
    wanted = None
    only_reports = bool(suites) and all(word.endswith(".report.yaml") for word in suites)
    if not rack:
        wanted = load_topology(
            topologies[0] if topologies else DEFAULT_TOPOLOGY,
            () if only_reports else settings,
            kernel=kernel,
            iommu_mode=iommu_mode,
            engine=None if engine == "all" else engine,
            trust=trust,
        )
    from testbed import deploy
    from testbed.harness.sources import RunningSource, TopologySource, engine_sources
    from testbed.topology.placement import place
    from testbed.verbs.install import install_for

    payload = words.payload(suites, kernel, place(wanted) if wanted else None)
    run_dir = run_folder(output, rack or (wanted.rack if wanted else "run"))
    reports = None
    if any(word not in known for word in suites):  # a path may be a report
        own = None if engine == "all" else engine
        reports = _report_options(
            settings if only_reports else (), (kernel, iommu_mode, own, qemu), trust=trust
        )
    installation = install_for([wanted], qemu=qemu) if wanted is not None else None
    say(f"run folder: {run_dir}")
    options = deploy.StartOptions(installation=installation, trust=trust, warm=warm or pristine)
    source = (
        RunningSource(rack or "", run_dir, options=options)
        if wanted is None
        else TopologySource(wanted, run_dir, options=options)
    )
    if wanted is not None and engine != "all" and shipped.begins_with_rack(suites):
        source.begin()  # it starts while pytest is imported
    from testbed.harness import runner
    from testbed.history.store import remember
    from testbed.results import record

    choice = runner.Choice(
        suites, keyword, chosen, reports, payload, policy=rule, pristine=pristine
    )
    stream = io.StringIO() if form == "json" else sys.stdout
    if wanted is not None and engine == "all":
        sources = engine_sources(wanted, run_dir, options)
        result = runner.run_engines(choice, sources, run_dir, stream=stream)
    else:
        with source:
            result = runner.run_suites(choice, source, run_dir, stream=stream)
    if not no_history:
        remember(run_dir, say, record=result.record)
    if form == "json":
        click.echo((run_dir / record.FILE_NAME).read_text())
    return result.code


def _report_options(
    settings: tuple[str, ...], overrides: tuple[str | None, ...], *, trust: bool
) -> ReportOptions:
    from testbed.harness.report_items import ReportOptions  # slow
    from testbed.reports.load import Overrides

    return ReportOptions(parse_settings(settings), Overrides(*overrides), trust)
