# SPDX-License-Identifier: Apache-2.0
"""IOMMU groups: what the guest kernel made of the tree, against what was predicted."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator

from testbed.instruments.interface import RackNode
from testbed.results.evidence import Counter, Evidence, Note
from testbed.results.judging import Judgement

Groups = Collection[frozenset[str]]


def observed_groups(node: RackNode) -> list[frozenset[str]]:
    """The guest's groups, each a set of addresses."""
    return [frozenset(group["devices"]) for group in node.agent.call("iommu.groups")]


def judge_groups(predicted: Groups, observed: Groups) -> Judgement:
    """Are the predicted groups just those that the guest has, of the devices predicted for?

    Devices that the prediction does not know (the machine's own host bridge and the like) do not
    count, but a group that mixes them with predicted ones is a difference.
    """
    known = frozenset().union(*predicted)
    relevant = {group for group in observed if group & known}
    missing = [group for group in predicted if group not in relevant]
    extra = [group for group in relevant if group not in predicted]
    evidence: list[Evidence] = [
        Counter("IOMMU groups predicted", len(predicted)),
        Counter("IOMMU groups observed", len(relevant)),
        *(Note(f"predicted only: {_shown(group)}") for group in missing),
        *(Note(f"observed only: {_shown(group)}") for group in extra),
    ]
    if missing or extra:
        first = missing[0] if missing else extra[0]
        where = "was predicted and is not there" if missing else "is there and was not predicted"
        return Judgement(False, f"IOMMU group {_shown(first)} {where}", tuple(evidence))
    return Judgement(True, f"{len(relevant)} IOMMU groups are as predicted", tuple(evidence))


@contextlib.contextmanager
def identity_domains(node: RackNode, addresses: Iterable[str]) -> Iterator[tuple[int, ...]]:
    """While it lasts, these devices' groups have the identity as their default domain.

    Yields the groups' numbers. AgentError if the kernel refuses: a device still has a driver.
    """
    wanted = set(addresses)
    before: dict[int, str] = {}
    try:
        for group in node.agent.call("iommu.groups"):
            if wanted & set(group["devices"]):
                changed = node.agent.call("iommu.set_type", group=group["id"], type="identity")
                before[group["id"]] = changed["old"]
        yield tuple(before)
    finally:
        for number, old in before.items():
            node.agent.call("iommu.set_type", group=number, type=old)


def _shown(group: frozenset[str]) -> str:
    return "{" + ", ".join(sorted(group)) + "}"
