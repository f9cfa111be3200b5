# SPDX-License-Identifier: Apache-2.0
"""How each figure that is promised is measured: as a user would see it, commands from exec on.

What is compared is measured in turns, in one run.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from testbed.benchmarks import growth, machines, suite, virtme
from testbed.benchmarks.commands import HELLO, STARTS, Commands
from testbed.errors import HostError
from testbed.host import paths
from testbed.host.packages import SetupOptions
from testbed.host.prepare import Installation
from testbed.results.verdicts import Verdict
from testbed.topology.model import Topology

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


def warm_start(bed: Bed, runs: int) -> Measured:
    """Seconds from exec to the hello of a restored machine."""
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


def against_virtme(bed: Bed, runs: int) -> Measured:
    """The same as a share of virtme-ng's cold boot, in turns."""
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


def pristine(bed: Bed, runs: int) -> Measured:
    """Seconds that a test takes longer on a machine of its own."""
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


def warm_suite(bed: Bed, runs: int) -> Measured:
    """Seconds from the command to its verdicts."""
    bed.commands.judged(_suite_words())
    times, used = [], []
    for run in range(runs):
        ran, record = bed.commands.judged(_suite_words())
        times.append(ran.seconds)
        used.append(ran.cpu_s)
        _say_run(bed, run, runs, f"{ran.seconds:.1f} s")
    return Measured(times, {"tests": len(record.outcomes), "cpu_s": machines.summary(used)})


def all_suites(bed: Bed, runs: int) -> Measured:
    """Seconds for all suites on all shipped racks, two at once, once everything has been made."""
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


def racks(bed: Bed, _: int) -> Measured:
    """MiB of the host's memory for each further rack."""
    found = machines.memory(bed.topology, bed.installation, bed.accelerator, racks=RACKS, warm=True)
    if found["machines_alive"] != RACKS:
        raise HostError(f"only {found['machines_alive']} of {RACKS} machines answer")
    keys = ("started_s", "added", "per_rack")
    return Measured([found["added_mean"]], {key: found[key] for key in keys})


def overhead(bed: Bed, runs: int) -> Measured:
    """Percent of the suite's processor time that is not QEMU's."""
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


def version(bed: Bed, runs: int) -> Measured:
    """Seconds until `testbed --version` has ended."""
    return _quick(bed, ["--version"], runs)


def validate(bed: Bed, runs: int) -> Measured:
    """Seconds until `testbed validate` of a large topology has ended."""
    file = bed.commands.folder / f"gpus-{GPUS}.yaml"
    file.write_text(growth.rack_of(GPUS))
    return _quick(bed, ["validate", str(file)], runs)


def _quick(bed: Bed, words: Sequence[str], runs: int) -> Measured:
    found = [bed.commands.run(words, good=(0,)) for _ in itertools.repeat(None, 2 * runs + 1)][1:]
    used = machines.summary([ran.cpu_s for ran in found])
    return Measured([ran.seconds for ran in found], {"cpu_s": used})


def _say_run(bed: Bed, run: int, runs: int, words: str) -> None:
    bed.say(f"  {run + 1} of {runs}: {words}")
