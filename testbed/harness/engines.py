# SPDX-License-Identifier: Apache-2.0
"""The same suites with one copy engine after the other: a device that lies is found by the others.

The testbed's own models are what most suites run on, and it would be easy to make a model pass.
QEMU's ``igb`` and ``edu`` were written by other people for other ends. Where they disagree about a
requirement, at least one of them is wrong, and that is a failure of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from testbed.results.evidence import Note
from testbed.results.verdicts import Outcome, Verdict, by_requirement

AGREEMENT = "engines_agree"


def labelled(engine: str, outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """The outcomes, with the engine in each test's name."""
    return tuple(
        Outcome(**{**vars(outcome), "test": f"{engine}/{outcome.test}"}) for outcome in outcomes
    )


def agreement(outcomes: Mapping[str, Sequence[Outcome]]) -> Outcome:
    """Do the engines say the same about every requirement that they could judge?

    A SKIP names what an engine cannot show, and a lost machine has shown nothing: neither
    contradicts the others, and both are in the evidence.
    """
    verdicts: dict[str, dict[str, Verdict]] = {}
    for engine, found in outcomes.items():
        for result in by_requirement(found):
            verdicts.setdefault(result.requirement, {})[engine] = result.verdict
    judged = (Verdict.PASS, Verdict.FAIL)
    split = []
    notes = []
    for requirement, by_engine in sorted(verdicts.items()):
        said = ", ".join(f"{verdict} by {engine}" for engine, verdict in by_engine.items())
        if len({verdict for verdict in by_engine.values() if verdict in judged}) > 1:
            split.append(f"{requirement} ({said})")
        elif len(set(by_engine.values())) > 1:
            notes.append(Note(f"{requirement}: {said}"))
    if split:
        reason = f"the engines disagree about {'; '.join(split)}"
        return Outcome((), AGREEMENT, Verdict.FAIL, reason, tuple(notes))
    judges = {e for said in verdicts.values() for e, verdict in said.items() if verdict in judged}
    if len(judges) < 2:
        what = f"a second engine that judged anything ({', '.join(judges) or 'none'} did)"
        return Outcome((), AGREEMENT, Verdict.SKIP, what, tuple(notes))
    names = ", ".join(engine for engine in outcomes if engine in judges)
    reason = f"{names} say the same of {len(verdicts)} requirements"
    return Outcome((), AGREEMENT, Verdict.PASS, reason, tuple(notes))
