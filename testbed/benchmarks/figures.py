# SPDX-License-Identifier: Apache-2.0
"""What the project promises, in numbers, and whether it holds on this machine.

One table (:data:`FIGURES`) has each figure's name, unit and wanted value, and how it is measured:
as a user would see it, commands from exec on. What is compared is measured in turns, in one run.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from testbed.benchmarks import growth, machines, suite, virtme
from testbed.benchmarks.commands import HELLO, STARTS, Commands
from testbed.errors import Diagnostic, ExitCode, HostError, InputError, Interrupted, TestbedError
from testbed.host import paths
from testbed.host.packages import SetupOptions
from testbed.host.prepare import Installation
from testbed.results.verdicts import Verdict
from testbed.topology.model import Topology
from testbed.topology.problem import nearest

RACK = "quad-gpu"
SUITE = "p2p-iommu"
ALL_S = 360.0
ALL_TIMEOUT_S = 3600.0
RACKS = 16
GPUS = 64


@dataclass(frozen=True)
class Measured:
    """What was measured: the value of each run, and ``details`` that explain them."""

    runs: Sequence[float]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bed:
    """What measuring takes.

    ``topology``, ``installation``  the rack :data:`RACK`, and with it its default kernel.
    ``setup``  for what is made when it is first wanted. ``say``: progress.
    """

    commands: Commands
    topology: Topology
    installation: Installation
    accelerator: str
    setup: SetupOptions
    runs: int
    say: Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """A promise.

    ``inclusive``  the wanted value itself is good.
    ``most``       at most so many runs, however many are asked for: it takes long.
    ``asked``      why it is measured only if it is asked for, "" if it always is.
    """

    name: str
    what: str
    unit: str
    wanted: float
    measure: Callable[[Bed, int], Measured]
    inclusive: bool = True
    most: int = 99
    asked: str = ""

    def holds(self, median: float) -> bool:
        """Whether a measured value keeps the promise."""
        return median <= self.wanted if self.inclusive else median < self.wanted


def chosen(words: Sequence[str]) -> tuple[str, ...]:
    """The names of figures that a user's words mean; none: those that are always measured.

    :raises InputError: there is no such figure.
    """
    known = (*NAMES, EVERY)
    wrong = [
        Diagnostic("--only", 0, 0, f"no figure '{word}'", ", ".join(known), nearest(word, known))
        for word in words
        if word not in known
    ]
    if wrong:
        raise InputError(diagnostics=wrong)
    if EVERY in words:
        return NAMES
    return tuple(words) or tuple(figure.name for figure in FIGURES if not figure.asked)


def report(names: Sequence[str], bed: Bed) -> dict[str, Any]:
    """Each figure of the table, measured if it is among ``names``.

    ``holds`` of the whole is None if nothing was missed but something could not be measured.
    """
    rows = []
    for figure in FIGURES:
        wanted = figure.name in names
        row = {
            "name": figure.name,
            "what": figure.what,
            "unit": figure.unit,
            "wanted": round(figure.wanted, 4),
            "compare": "<=" if figure.inclusive else "<",
            "asked_for": wanted,
        }
        if wanted:
            bed.say(f"{figure.name}: {figure.what}")
            row |= _measured(figure, bed)
            bed.say(f"{figure.name}: {summary_line(row)}")
        else:
            why = figure.asked or "not asked for"
            row |= {"measured": None, "holds": None, "why": why}
        rows.append(row)
    asked = [row for row in rows if row["asked_for"]]
    shares = {row["name"]: row["of_wanted"] for row in asked if row.get("of_wanted") is not None}
    missed = any(row["holds"] is False for row in asked)
    holds = False if missed else None if any(row["holds"] is None for row in asked) else True
    return {"unit": "parts of what is wanted", "holds": holds, "figures": rows, "of_wanted": shares}


def exit_code(result: Mapping[str, Any]) -> ExitCode:
    """PASS if all hold, FAIL if one is missed, else as the one that could not be measured ended."""
    if result["holds"] is not None:
        return ExitCode.PASS if result["holds"] else ExitCode.FAIL
    codes = [row["exit_code"] for row in result["figures"] if row.get("exit_code") is not None]
    return ExitCode.SKIP if set(codes) <= {ExitCode.SKIP} else ExitCode.ERROR


def summary_line(row: Mapping[str, Any]) -> str:
    """One figure as a person reads it."""
    if row["measured"] is None:
        return f"not measured: {row['why']}"
    value, unit = row["measured"]["median"], row["unit"]
    words = "holds" if row["holds"] else "MISSED"
    return f"{words}: {value:.3g} {unit} (wanted {row['compare']} {row['wanted']:.3g})"


def _measured(figure: Figure, bed: Bed) -> dict[str, Any]:
    began_s = time.monotonic()
    try:
        found = figure.measure(bed, min(bed.runs, figure.most))
    except Interrupted:
        raise
    except TestbedError as error:
        return {
            "measured": None,
            "holds": None,
            "why": error.message,
            "exit_code": int(error.exit_code),
            "took_s": round(time.monotonic() - began_s, 1),
        }
    summary = machines.summary(found.runs)
    return {
        "measured": {**summary, "runs": [round(value, 4) for value in found.runs]},
        "of_wanted": round(summary["median"] / figure.wanted, 3),
        "holds": figure.holds(statistics.median(found.runs)),
        "why": "",
        "details": dict(found.details),
        "took_s": round(time.monotonic() - began_s, 1),
    }


@dataclass(frozen=True)
class _Start:
    """Seconds from exec to the hello, and to the end of the command, and the processor time of all
    processes, some tenths of a second later.
    """

    hello_s: float
    ended_s: float
    cpu_s: float


def _up(bed: Bed, *words: str, saves: bool = False) -> _Start:
    """Start the rack, as a command, and end it again.

    :param saves: the machine may be booted and saved: nothing is measured.
    :raises HostError: it was not restored, and why.
    """
    ran = bed.commands.run(
        ["up", RACK, "--warm", "--name", "figure", *words], until=HELLO, good=(0,)
    )
    (rack,) = json.loads(bed.commands.run(["ps", "--format", "json"], good=(0,)).stdout)["racks"]
    mains = [rack["keeper_pid"], *(each["pid"] for each in rack["processes"])]
    pids = {pid for main in mains for pid in (main, *machines.children(main))}
    cpu_s = ran.cpu_s + sum(map(machines.used_s, pids))
    bed.commands.run(["down", "figure", "--now"], good=(0,))
    more = [line for line in ran.stderr.splitlines() if HELLO not in line and STARTS not in line]
    if more and not saves:
        raise HostError(f"a machine was not restored: {'; '.join(more)}")
    return _Start(ran.said_s, ran.seconds, cpu_s)


def _warm_start(bed: Bed, runs: int) -> Measured:
    _up(bed, saves=True)
    starts: list[_Start] = []
    for run in range(runs):
        starts.append(_up(bed))
        _say_run(bed, run, runs, f"{starts[-1].hello_s:.2f} s")
    details = {
        "command_ended_s": machines.summary([each.ended_s for each in starts]),
        "cpu_s": machines.summary([each.cpu_s for each in starts]),
    }
    return Measured([each.hello_s for each in starts], details)


def _against_virtme(bed: Bed, runs: int) -> Measured:
    kernel = ("--kernel", "generic")
    peer = virtme.Peer.of("generic", bed.installation, bed.accelerator, bed.setup)
    _up(bed, *kernel, saves=True)
    ours: list[_Start] = []
    theirs: list[virtme.Boot] = []
    for run in range(runs):
        theirs.append(peer.run())
        ours.append(_up(bed, *kernel))
        _say_run(bed, run, runs, f"{ours[-1].hello_s:.2f} s against {theirs[-1].ran_s:.1f} s")
    cold = statistics.median(each.ran_s for each in theirs)
    cpu = [[each.cpu_s for each in ours], [each.cpu_s for each in theirs]]
    details = {
        "warm_s": machines.summary([each.hello_s for each in ours]),
        "virtme_ng_s": machines.summary([each.ran_s for each in theirs]),
        "virtme_ng_ended_s": machines.summary([each.seconds for each in theirs]),
        "cpu_s": dict(zip(("warm", "virtme_ng"), map(machines.summary, cpu), strict=True)),
        "cpu_ratio": round(statistics.median(cpu[0]) / statistics.median(cpu[1]), 4),
        "virtme_ng": peer.version,
        "kernel": peer.release,
    }
    return Measured([each.hello_s / cold for each in ours], details)


def _suite_words(*more: str) -> list[str]:
    return [SUITE, "-t", RACK, "--warm", *more]


def _pristine(bed: Bed, runs: int) -> Measured:
    bed.commands.judged(_suite_words())
    values, warm, pristine = [], [], []
    for run in range(runs):
        plain, record = bed.commands.judged(_suite_words())
        fresh, _ = bed.commands.judged(_suite_words("--pristine"))
        warm.append(plain.seconds)
        pristine.append(fresh.seconds)
        values.append((fresh.seconds - plain.seconds) / len(record.outcomes))
        _say_run(bed, run, runs, f"{values[-1]:.2f} s a test")
    return Measured(
        values,
        {"warm_s": machines.summary(warm), "pristine_s": machines.summary(pristine)},
    )


def _suite(bed: Bed, runs: int) -> Measured:
    bed.commands.judged(_suite_words())
    times, used = [], []
    for run in range(runs):
        ran, record = bed.commands.judged(_suite_words())
        times.append(ran.seconds)
        used.append(ran.cpu_s)
        _say_run(bed, run, runs, f"{ran.seconds:.1f} s")
    return Measured(times, {"tests": len(record.outcomes), "cpu_s": machines.summary(used)})


def _all_suites(bed: Bed, runs: int) -> Measured:
    racks = sorted(path.stem for path in paths.data_dir("topologies").glob("*.yaml"))
    words = ["all", *(word for name in racks for word in ("-t", name)), "-j", "2", "--warm"]
    times: list[float] = []
    before: list[float] = []
    while len(times) < runs:
        # Some of Linux's own faults are FAILs.
        ran, record = bed.commands.judged(words, good=(0, 1), timeout_s=ALL_TIMEOUT_S)
        ends = Counter(str(outcome.verdict) for outcome in record.outcomes)
        bed.say(f"  {ran.seconds:.0f} s: {', '.join(f'{n} {end}' for end, n in ends.items())}")
        if broken := ends[str(Verdict.LOST)] + ends[str(Verdict.ERROR)]:
            raise HostError(f"{broken} of {len(record.outcomes)} tests were not judged")
        if ran.seconds >= ALL_S and not before:
            before.append(ran.seconds)  # it may have had machines to save and modules to build
        else:
            times.append(ran.seconds)
    return Measured(times, {"topologies": racks, "ends": ends, "first_s": before})


def _racks(bed: Bed, _: int) -> Measured:
    found = machines.memory(bed.topology, bed.installation, bed.accelerator, racks=RACKS, warm=True)
    if found["machines_alive"] != RACKS:
        raise HostError(f"only {found['machines_alive']} of {RACKS} machines answer")
    keys = ("started_s", "added", "per_rack")
    return Measured([found["added_mean"]], {key: found[key] for key in keys})


def _overhead(bed: Bed, runs: int) -> Measured:
    words = [SUITE, "-t", RACK]
    values, warm = [], []
    for run in range(runs):
        cold = suite.cost(words, runs=1)
        restored = suite.cost([*words, "--warm"], runs=1)
        for each in (cold, restored):
            if each["not_passed"]:
                raise HostError("; ".join(each["not_passed"][:3]))
        values.append(100 * cold["overhead"])
        warm.append(100 * restored["overhead"])
        _say_run(bed, run, runs, f"{values[-1]:.1f} %")
    details = {"booted": cold["cpu_s"], "restored": restored["cpu_s"]}
    return Measured(values, {**details, "restored_percent": machines.summary(warm)})


def _version(bed: Bed, runs: int) -> Measured:
    return _quick(bed, ["--version"], runs)


def _validate(bed: Bed, runs: int) -> Measured:
    file = bed.commands.folder / f"gpus-{GPUS}.yaml"
    file.write_text(growth.rack_of(GPUS))
    return _quick(bed, ["validate", str(file)], runs)


def _quick(bed: Bed, words: Sequence[str], runs: int) -> Measured:
    found = [bed.commands.run(words, good=(0,)) for _ in itertools.repeat(None, 2 * runs + 1)][1:]
    used = machines.summary([ran.cpu_s for ran in found])
    return Measured([ran.seconds for ran in found], {"cpu_s": used})


def _say_run(bed: Bed, run: int, runs: int, words: str) -> None:
    bed.say(f"  {run + 1} of {runs}: {words}")


FIGURES = (
    Figure(
        "warm-start",
        f"`testbed up {RACK} --warm`, exec to the agent's hello",
        "s",
        1.0,
        _warm_start,
    ),
    Figure(
        "warm-against-virtme",
        "the same, to virtme-ng's cold boot of the same kernel until its command runs",
        "ratio",
        1 / 15,
        _against_virtme,
        asked="installs virtme-ng: --only warm-against-virtme",
    ),
    Figure(
        "pristine",
        f"a machine that no test has used for each test of {SUITE}: what a test takes longer",
        "s",
        0.5,
        _pristine,
        most=3,
    ),
    Figure(
        "suite",
        f"`testbed run {SUITE} -t {RACK} --warm`, command to verdicts",
        "s",
        8.0,
        _suite,
        inclusive=False,
    ),
    Figure(
        "all-suites",
        "`testbed run all -j 2 --warm` on all shipped topologies",
        "s",
        ALL_S,
        _all_suites,
        inclusive=False,
        most=1,
        asked="takes ten minutes and more: --only all-suites",
    ),
    Figure(
        "racks",
        f"{RACKS} racks {RACK}, restored, at once: the host's memory for each further one",
        "MiB",
        150.0,
        _racks,
        inclusive=False,
        most=1,
        asked="fills a machine of 4 GiB: --only racks",
    ),
    Figure(
        "overhead",
        f"what is not QEMU in the processor time of {SUITE} on {RACK}, booted",
        "%",
        15.0,
        _overhead,
        inclusive=False,
        most=3,
    ),
    Figure("version", "`testbed --version`", "s", 0.25, _version, inclusive=False),
    Figure(
        "validate",
        f"`testbed validate` of {GPUS} GPUs",
        "s",
        0.5,
        _validate,
        inclusive=False,
    ),
)
EVERY = "every"
NAMES = tuple(figure.name for figure in FIGURES)
