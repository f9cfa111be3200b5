# SPDX-License-Identifier: Apache-2.0
"""`testbed run` with `-j`, or with several racks: which parts there are, in words."""

from __future__ import annotations

import io
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.errors import InputError
from testbed.topology.engines import ENGINES
from testbed.verbs.common import load_topology, say

if TYPE_CHECKING:
    from testbed.matrix.apart import Part
    from testbed.topology.model import Topology

# Said for each part anew, or only of the whole.
_OF_THE_WHOLE = frozenset(
    {"suites", "topologies", "engine", "jobs", "output", "form", "no_history", "only_list"}
)


def words_of(context: click.Context, without: frozenset[str] = _OF_THE_WHOLE) -> list[str]:
    """The options that a verb was given, wherever from, as words for another one of it."""
    words: list[str] = []
    for parameter in context.command.params:
        value: Any = context.params.get(parameter.name or "")
        if parameter.name in without or not isinstance(parameter, click.Option):
            continue
        name = max(parameter.opts, key=len)
        if parameter.is_flag:
            words += [name] if value else parameter.secondary_opts[:1]
        elif value is None or value == "":
            continue
        else:
            for each in value if parameter.multiple else (value,):
                words += [name, str(each)]
    return words


def run_apart(
    context: click.Context,
    suites: Sequence[str],
    files: Sequence[str],
    *,
    run_dir: Path,
    form: str,
    **overrides: Any,
) -> int:
    """Run every suite on every rack, with every engine if all are wanted.

    :param overrides: as :func:`testbed.chosen_topology.load_topology` takes them.
    :raises InputError: whatever is wrong with one of them; nothing has started then.
    """
    from testbed.harness.shipped import SUITES, suite_paths
    from testbed.history.store import remember
    from testbed.instruments.mutations import parse_mutation
    from testbed.matrix.apart import Apart
    from testbed.matrix.needs import room_here
    from testbed.results import record
    from testbed.verbs.install import install_for

    for suite in suites:
        suite_paths(suite)
    named = [name for word in suites for name in (SUITES if word == "all" else (word,))]
    every = overrides.pop("engine") == "all"
    engine = None if every else context.params.get("engine")
    racks = {
        file: load_topology(file, overrides.get("settings", ()), engine=engine, **_rest(overrides))
        for file in dict.fromkeys(files)
    }
    parts = list(_parts(context, racks, list(dict.fromkeys(named)), every, engine))
    install_for(racks.values(), qemu=context.params.get("qemu"))
    say(f"run folder: {run_dir}")
    run = Apart(
        parts,
        run_dir,
        room_here(context.params.get("jobs") or 1),
        sys.argv,
        mutation=str(parse_mutation(context.params["mutation"])),
    )
    if not context.params["no_history"]:
        run.note = lambda part: remember(part, say)
    stream = io.StringIO() if form == "json" else sys.stdout
    code = run.run(stream)
    if form == "json":
        click.echo((run_dir / record.FILE_NAME).read_text())
    return code


def _rest(overrides: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in overrides.items() if name != "settings"}


def _parts(
    context: click.Context,
    racks: dict[str, Topology],
    suites: Sequence[str],
    every: bool,
    engine: str | None,
) -> list[Part]:
    from testbed.harness.shipped import suite_paths
    from testbed.matrix.apart import Part
    from testbed.matrix.needs import need_of
    from testbed.reports.model import SUFFIX

    common = words_of(context)
    made: dict[str, Part] = {}
    engines = ENGINES if every else (engine or "",)
    reports = [suite for suite in suites if suite.endswith(SUFFIX)]
    others = [suite for suite in suites if suite not in reports]
    # A report brings a rack of its own.
    first = next(iter(racks))
    pairs = [*itertools.product(racks, others), *((first, report) for report in reports)]
    for (file, suite), each in itertools.product(pairs, engines):
        topology = racks[file]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(suite).name)
        group = _unused(f"{topology.rack}-{name}", made, each if every else "")
        label = f"{group}-{each}" if every else group
        words = [suite, "-t", file, *common, *(["--engine", each] if each else [])]
        need = need_of(topology)
        # What there is to do: a suite's modules, and machines to boot.
        weight = len(suite_paths(suite)) * len(topology.nodes)
        made[label] = Part(label, tuple(words), need, group if every else "", each, weight)
    return list(made.values())


def _unused(wanted: str, made: dict[str, Part], engine: str) -> str:
    """A label that no other part has: two files may call their racks the same."""
    ending = f"-{engine}" if engine else ""
    for number in itertools.count(1):
        label = wanted if number == 1 else f"{wanted}-{number}"
        if f"{label}{ending}" not in made:
            return label
    raise InputError("no name is left")  # not reached
