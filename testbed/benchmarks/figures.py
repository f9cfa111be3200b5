# SPDX-License-Identifier: Apache-2.0
"""What the project promises, in numbers, and whether it holds on this machine.

One table (:data:`FIGURES`) has each figure's name, unit and wanted value, and how it is measured
(:mod:`testbed.benchmarks.promised`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.benchmarks import machines, promised
from testbed.benchmarks.promised import ALL_S, GPUS, RACK, RACKS, SUITE, Bed, Measured
from testbed.errors import Diagnostic, ExitCode, InputError, Interrupted, TestbedError
from testbed.topology.problem import nearest


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


FIGURES = (
    Figure(
        "warm-start",
        f"`testbed up {RACK} --warm`, exec to the agent's hello",
        "s",
        1.0,
        promised.warm_start,
    ),
    Figure(
        "warm-against-virtme",
        "the same, to virtme-ng's cold boot of the same kernel until its command runs",
        "ratio",
        1 / 15,
        promised.against_virtme,
        asked="installs virtme-ng: --only warm-against-virtme",
    ),
    Figure(
        "pristine",
        f"a machine that no test has used for each test of {SUITE}: what a test takes longer",
        "s",
        0.5,
        promised.pristine,
        most=3,
    ),
    Figure(
        "suite",
        f"`testbed run {SUITE} -t {RACK} --warm`, command to verdicts",
        "s",
        8.0,
        promised.warm_suite,
        inclusive=False,
    ),
    Figure(
        "all-suites",
        "`testbed run all -j 2 --warm` on all shipped topologies",
        "s",
        ALL_S,
        promised.all_suites,
        inclusive=False,
        most=1,
        asked="takes ten minutes and more: --only all-suites",
    ),
    Figure(
        "racks",
        f"{RACKS} racks {RACK}, restored, at once: the host's memory for each further one",
        "MiB",
        150.0,
        promised.racks,
        inclusive=False,
        most=1,
        asked="fills a machine of 4 GiB: --only racks",
    ),
    Figure(
        "overhead",
        f"what is not QEMU in the processor time of {SUITE} on {RACK}, booted",
        "%",
        15.0,
        promised.overhead,
        inclusive=False,
        most=3,
    ),
    Figure("version", "`testbed --version`", "s", 0.25, promised.version, inclusive=False),
    Figure(
        "validate",
        f"`testbed validate` of {GPUS} GPUs",
        "s",
        0.5,
        promised.validate,
        inclusive=False,
    ),
)
EVERY = "every"
NAMES = tuple(figure.name for figure in FIGURES)
