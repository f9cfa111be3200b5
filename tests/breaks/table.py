# SPDX-License-Identifier: Apache-2.0
"""Which deliberate break fails which rows of which suite: read from the tables that tests run.

``python -m tests.breaks.table > docs/breaks.md`` writes the document.
"""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping

from testbed.harness.shipped import SUITES
from testbed.instruments.mutations import DESCRIPTIONS, Mutation
from testbed.suites.p2p_dmabuf import LINKED_TWICE, NOT_HELD_AGAINST_MASK
from tests.breaks import dmabuf_breaks, fabric_breaks, negotiation_breaks
from tests.breaks.guards import requirements_of
from tests.contract import test_suite_mutations as iommu
from tests.vm import test_suite_hmm as hmm
from tests.vm import test_suite_kernel as kernel

# Watched by hand with ``testbed run SUITE --break NAME``: they take longer than CI has for them.
BY_HAND: dict[tuple[str, Mutation], set[str]] = {
    ("p2p-kernel", Mutation.ELSEWHERE): {f"TOPO-{n:02}" for n in (1, 2, 3, 5, 6, 8, 9)},
    ("p2p-kernel", Mutation.WRONG_CPU): {"TOPO-12"},
    ("p2p-kernel", Mutation.KEEP_PROVIDER): {"LIFE-08"},
    ("p2p-kernel", Mutation.KEEP_PLUGGED): {"LIFE-09"},
    ("p2p-dmabuf", Mutation.KEEP_PLUGGED): {"LIFE-09"},
    **{("p2p-fabric", mutation): ids for mutation, ids in fabric_breaks.BY_HAND.items()},
}
# Rows that need no break, and why not.
WITHOUT_BREAK = {
    "MAP-03": "the exporter of a bus address is the break, and is caught (no-mistake: it is right)",
    "MAP-05": "no mapping can have an address beyond the width: there is nothing to break",
    "MAP-07": "says what translation would have to show, and shows nothing itself",
    "TOPO-13": "tests/contract gives it wrong groups",
    "TOPO-16": "tests/vm/test_model_routing.py watches both ways, and the change between them",
}

_HEAD = """\
<!-- SPDX-License-Identifier: Apache-2.0 -->
# Breaks: how to see a FAIL

A suite that never failed shows little. `testbed run SUITE --break NAME` breaks one thing on
purpose, and the requirements that guard it must FAIL. Each line below was watched: in CI, or by
hand where it says so. A break may fail more rows than those, which it was watched with. Generated
from the tables that the tests run, by `python -m tests.breaks.table > docs/breaks.md`.

| `--break` | what is broken | suite | FAILs |
|---|---|---|---|
"""
_KNOWN = """
Linux fails these by itself. They stay FAILs, and bring the kernel's mistake with them:

| row | where | why |
|---|---|---|
| MAP-13 | `p2p-dmabuf`, a switch in common, no IOMMU | {mask} |
| MAP-15 | `p2p-dmabuf`, through the host bridge and an IOMMU | {twice} |
"""


def failing() -> dict[tuple[str, Mutation], set[str]]:
    """The rows that fail, by suite and break."""
    found: defaultdict[tuple[str, Mutation], set[str]] = defaultdict(set)
    for mutation, ids in iommu.FAILING.items():
        found["p2p-iommu", mutation] |= ids
    for mutation, _, ids in kernel.BREAKS:
        found["p2p-kernel", mutation] |= ids
    for mutation, test, _ in dmabuf_breaks.GUARDS:
        found["p2p-dmabuf", mutation] |= requirements_of(test)
    for mutation, test, _ in negotiation_breaks.GUARDS:
        found["p2p-negotiation", mutation] |= requirements_of(test)
    for mutation, test, _ in fabric_breaks.GUARDS:
        found["p2p-fabric", mutation] |= requirements_of(test)
    for mutation, ids in fabric_breaks.FAILING.items():
        found["p2p-fabric", mutation] |= ids
    for mutation, ids in hmm.FAILING.items():
        if mutation:
            found["p2p-hmm", mutation] |= ids
    for key, ids in BY_HAND.items():
        found[key] |= ids
    return dict(found)


def rows_of(suite: str) -> set[str]:
    """The IDs that a suite's tests are marked with."""
    found: set[str] = set()
    for file in SUITES[suite]:
        module = importlib.import_module(f"testbed.suites.{file.removesuffix('.py')}")
        for name, value in vars(module).items():
            if name.startswith("test_"):
                found |= requirements_of(value)
    return found


def document(failing: Mapping[tuple[str, Mutation], Iterable[str]]) -> str:
    """The page."""
    order = {mutation: number for number, mutation in enumerate(DESCRIPTIONS)}
    lines = [
        f"| `{mutation}` | {DESCRIPTIONS[mutation]} | {suite} | {', '.join(sorted(ids))}"
        f"{' (by hand)' if (suite, mutation) in BY_HAND else ''} |\n"
        for (suite, mutation), ids in sorted(
            failing.items(), key=lambda i: (i[0][0], order[i[0][1]])
        )
    ]
    reasons = "".join(f"| {row} | {why} |\n" for row, why in sorted(WITHOUT_BREAK.items()))
    without = f"\nRows without a break of their own:\n\n| row | why |\n|---|---|\n{reasons}"
    known = _KNOWN.format(mask=NOT_HELD_AGAINST_MASK, twice=LINKED_TWICE)
    return _HEAD + "".join(lines) + without + known


if __name__ == "__main__":
    sys.stdout.write(document(failing()))
