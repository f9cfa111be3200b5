# SPDX-License-Identifier: Apache-2.0
"""Verbs that show a rack's tree and who reaches whom: `topo` in words, `graph` as a picture."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.errors import Diagnostic, InputError
from testbed.verbs.common import (
    format_option,
    load_topology,
    print_json,
    rack_argument,
    say,
    settings_option,
)

if TYPE_CHECKING:
    from testbed.topology.matrix import Cell, Decision, Findings, Matrix, Measured, Unknown
    from testbed.topology.plan import RackPlan

MIN_WIDTH = 80


@click.command()
@rack_argument()
@settings_option
@click.option(
    "--predict",
    is_flag=True,
    help="No machine is asked: what the topology (a FILE, a shipped one's name, or RACK's) says.",
)
@click.option("--no-measure", is_flag=True, help="Ask the kernels, but move no bytes.")
@click.option(
    "--explain",
    nargs=2,
    metavar="A B",
    help="Every fact behind one pair: A's DMA to the memory of B; and the interconnect that each"
    " policy of negotiation would choose.",
)
@format_option("text", "json")
def topo(
    rack: str,
    settings: tuple[str, ...],
    predict: bool,
    no_measure: bool,
    explain: tuple[str, str] | None,
    form: str,
) -> None:
    """RACK's PCI tree, as planned and as its guest kernels see it, and its peer matrix.

    Each cell has the words of `nvidia-smi topo -m` and up to three values: what the topology
    predicts, what the guest's kernel decides (pci_p2pdma), and where bytes went that were moved.
    Where they contradict one another, the cell has a `!`, a line says what, and the exit code is 1.

    Measuring takes the rack's engines and idle disks for some seconds, puts back what it wrote
    over, and leaves alone what a driver or a mount uses.
    """
    from testbed.errors import ExitCode
    from testbed.topology import matrix as matrices

    if predict:
        plan = plan_of(rack, settings)
        disagree = _show(rack, plan, None, {}, explain, form)
    else:
        from testbed.instruments import p2p_matrix
        from testbed.rack import attach, split_name
        from testbed.topology.compare import compare

        if settings:
            raise InputError("-s changes a topology, not a rack that runs", hint="--predict")
        name, _ = split_name(rack)
        with attach(name) as running:
            plan = running.plan
            only: tuple[str, ...] = ()
            if explain:
                pair = _chosen(matrices.matrix(plan), explain)
                only = (pair.requester.name, pair.target.name)
            trees = {n: node.agent.call("pci.tree")["devices"] for n, node in running.nodes.items()}
            wrong = {n: compare(plan.nodes[n], tree) for n, tree in trees.items()}
            findings = p2p_matrix.find_out(running, trees, measure=not no_measure, only=only)
        for node, platform in findings.platforms.items():
            wrong[node] += matrices.changed_ports(plan, node, platform.redirecting)
        disagree = _show(name, plan, findings, wrong, explain, form, trees)
    if disagree:
        click.get_current_context().exit(ExitCode.FAIL)


def plan_of(word: str, settings: Sequence[str]) -> RackPlan:
    """Of a rack that runs under that name, or else of a topology.

    :raises InputError: neither; all that is wrong with the file.
    """
    from testbed.host import paths
    from testbed.machine import registry
    from testbed.topology import model, placement

    for info in registry.list_racks(paths.runtime_dir()):
        if info.name == word and info.record and not settings:
            say(f"the rack {word}, as it was started")
            return placement.place(model.from_data(info.record.topology))
    return placement.place(load_topology(word, settings))


def _show(
    name: str,
    plan: RackPlan,
    findings: Findings | None,
    wrong: Mapping[str, Sequence[str]],
    explain: tuple[str, str] | None,
    form: str,
    trees: Mapping[str, Any] | None = None,
) -> bool:
    """Print it all; True if something disagrees."""
    from testbed.topology import drawing, matrix_drawing, policies
    from testbed.topology import matrix as matrices

    found = matrices.matrix(plan, findings)
    chosen = _chosen(found, explain) if explain else None
    loud = [f"{node}: {line}" for node, lines in wrong.items() for line in lines]
    loud += chosen.disagreements if chosen else found.disagreements
    facts: list[str] = []
    choices: tuple[policies.Choice, ...] = ()
    if chosen:
        platform = matrices.platform_for(plan, findings, chosen.requester.node)
        facts = matrix_drawing.explanation(plan, chosen, platform)
        choices = policies.compare(plan, chosen.requester, chosen.target)
        facts += policies.lines(choices)
    if form == "json":
        cells = [chosen] if chosen else list(found.cells.values())
        body: dict[str, Any] = {
            "rack": name,
            "nodes": trees or {},
            "disagreements": wrong,
            "peers": [{"name": p.name, "node": p.node, "kind": p.kind} for p in found.peers],
            "cells": [_cell_data(cell) for cell in cells],
        }
        more = {"explanation": facts, "policies": [asdict(each) for each in choices]}
        print_json("testbed.topo/1", {**body, **(more if facts else {})})
    elif chosen:
        click.echo("\n".join(facts))
        for line in loud[: len(loud) - len(chosen.disagreements)]:
            click.echo(f"{'DISAGREES':<12} {line}")
    else:
        width = max(MIN_WIDTH, shutil.get_terminal_size().columns)
        click.echo(f"{drawing.tree(plan)}\n\n{matrix_drawing.text(found, width)}")
        for line in loud:
            click.echo(f"DISAGREES {line}")
    return bool(loud)


def _chosen(found: Matrix, words: tuple[str, str]) -> Cell:
    """The cell of two devices, named ``gpu0`` or ``host0/gpu0``. InputError names the nearest."""
    from testbed.topology.problem import listing, nearest

    names = [peer.name for peer in found.peers]
    chosen: list[str] = []
    wrong: list[Diagnostic] = []
    for word in words:
        fits = [name for name in names if word in (name, name.rpartition("/")[2])]
        fits = fits or [p.name for p in found.peers if word == f"{p.node}/{p.client.device}"]
        if len(fits) != 1:
            what = f"'{word}' is in several machines" if fits else f"no peer '{word}'"
            expected = f"one of {listing(fits or names)}"
            wrong.append(Diagnostic("--explain", 0, 0, what, expected, nearest(word, names)))
        chosen += fits[:1]
    if not wrong and chosen[0] == chosen[1]:
        wrong.append(Diagnostic("--explain", 0, 0, f"'{words[0]}' twice", "two devices"))
    if wrong:
        raise InputError(diagnostics=wrong)
    return found.cells[chosen[0], chosen[1]]


def _cell_data(cell: Cell) -> dict[str, Any]:
    predicted = cell.predicted
    return {
        "from": cell.requester.name,
        "to": cell.target.name,
        "word": predicted.word,
        "pcie": predicted.near,
        "predicted": {
            **_value_data(predicted.decision),
            "route": predicted.route,
            "redirects": predicted.redirects,
            "moves": predicted.moves,
        },
        "kernel": _value_data(cell.kernel),
        "measured": _value_data(cell.measured),
        "notes": cell.notes,
        "disagreements": cell.disagreements,
    }


def _value_data(value: Decision | Measured | Unknown) -> dict[str, Any]:
    from testbed.topology.matrix import Decision, Measured

    if isinstance(value, Decision):
        return {"type": value.kind, "distance": value.distance}
    if isinstance(value, Measured):
        return {"moves": value.moves}
    return {"unknown": value.why}


@click.command()
@click.argument("file", metavar="FILE|RACK")
@settings_option
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to; stdout if not given.",
)
@format_option("svg", "dot", default=None)
def graph(file: str, settings: tuple[str, ...], output: Path | None, form: str | None) -> None:
    """Draw the rack of topology FILE, or a RACK that runs, as a picture (SVG) or for Graphviz.

    Switches, devices, private links and the IOMMU groups that Linux will make. The SVG is one file
    that needs nothing else, and is light or dark as the reader's browser is. Without --format the
    output's name decides: `.dot` and `.gv` are for Graphviz, all else is SVG.
    """
    from testbed.topology import graph as graphs
    from testbed.topology import graph_dot, graph_svg

    if form is None:
        form = "dot" if output is not None and output.suffix in {".dot", ".gv"} else "svg"
    plan = plan_of(file, settings)
    picture = graphs.layout(plan)
    text = graph_svg.svg(picture) if form == "svg" else graph_dot.dot(picture)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from None
    say(f"{output} is written")
