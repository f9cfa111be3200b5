# SPDX-License-Identifier: Apache-2.0
"""What each proposal says of a negotiation, to judge the core by: written from their texts, with no
help from the core's code.

A rule picks from two lists of offers. It sees what a path is like through ``rank``, which is by
facts alone: the bytes stay in device memory, fewer redirects, not through the root complex, nothing
translates, more bandwidth, fewer hops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from testbed.errors import Diagnostic, InputError
from testbed.topology.interconnects import Offer
from testbed.topology.problem import nearest

Rank = tuple[object, ...]
_PRIVATE = ("xgmi", "nvlink", "xelink")
# Nominal gigabits a second of a lane, as the vendors publish them: AMD's xGMI 2, NVIDIA's NVLink 3,
# Intel's Xe Link; PCI Express 4.0 is the rest, with its 130 bits for 128.
_LANE_GBPS = {"xgmi": 25.0, "nvlink": 50.0, "xelink": 53.0}
_PCIE_LANE_GBPS = 16 * 128 / 130


@dataclass(frozen=True)
class Pair:
    """An offer of the exporter and one of the importer that meet; ``rank``: less is better."""

    exporter_index: int
    importer_index: int
    kind: str
    importer: Offer
    rank: Rank


def _rfc(pair: Pair, kinds: Sequence[str]) -> Rank:  # noqa: ARG001  one form for all
    """RFC 2026-02, dma_buf_match_mapping: both lists in their order, the exporter's outside."""
    return (pair.exporter_index, pair.importer_index)


def _mailing_list(pair: Pair, kinds: Sequence[str]) -> Rank:
    """2025-09: the exporter's list says which type; of several paths of it the best quality."""
    return (kinds.index(pair.kind), pair.rank, pair.exporter_index, pair.importer_index)


def _best_quality(pair: Pair, kinds: Sequence[str]) -> Rank:  # noqa: ARG001
    """2025-09: N by M, "the best quality path is selected"; the exporter decides among equals."""
    return (pair.rank, pair.exporter_index, pair.importer_index)


def _private_first(pair: Pair, kinds: Sequence[str]) -> Rank:
    """2025-09: dma_buf_map_interconnect(), and if that fails dma_buf_map_attachment()."""
    stage = -1 if pair.kind in _PRIVATE else kinds.index(pair.kind)
    return (stage, pair.rank, pair.exporter_index, pair.importer_index)


_RULES: Mapping[str, Callable[[Pair, Sequence[str]], Rank]] = {
    "best-quality": _best_quality,
    "exporter-priority": _rfc,
    "mailing-list": _mailing_list,
    "private-first": _private_first,
}
POLICIES = tuple(_RULES)
DEFAULT_POLICY = POLICIES[0]


def parse_policy(word: str) -> str:
    """The word, if it is a policy or "". :raises InputError: it is not; names the nearest."""
    if word in ("", *POLICIES):
        return word
    known, near = ", ".join(POLICIES), nearest(word, POLICIES)
    raise InputError(
        diagnostics=[Diagnostic("--policy", 0, 0, f"unknown policy '{word}'", known, near)]
    )


def expected(
    policy: str,
    exporter: Sequence[Offer],
    importer: Sequence[Offer],
    facts: Mapping[str, Any],
) -> Pair:
    """What the policy must choose of two lists that have something in common.

    :param facts: as the core is told them (:func:`testbed.topology.interconnects.tables`).
    """
    kinds = [offer["kind"] for offer in exporter]
    pairs = [
        Pair(i, j, ours["kind"], theirs, rank)
        for i, ours in enumerate(exporter)
        for j, theirs in enumerate(importer)
        if ours["kind"] == theirs["kind"]
        and (rank := _rank(ours, theirs, facts)) is not None
    ]  # fmt: skip
    return min(pairs, key=lambda pair: _RULES[policy](pair, kinds))


def _rank(ours: Offer, theirs: Offer, facts: Mapping[str, Any]) -> Rank | None:
    """How good the path is, or None if there is none."""
    if ours["kind"] in _PRIVATE:
        ends = [[ours["device"], ours["port"]], [theirs["device"], theirs["port"]]]
        for link in facts["links"]:
            if link["kind"] == ours["kind"] and sorted(link["ends"]) == sorted(ends):
                rate = _LANE_GBPS[link["kind"]] * link["width"]
                return (0, 0, False, False, -rate, 1)
        return None
    if ours["kind"] == "system":
        way = facts["system"][theirs["device"]]
        return (1, *_numbers(way))
    for way in facts["pcie"]:
        if (way["exporter"], way["importer"]) == (ours["device"], theirs["device"]):
            return (0, *_numbers(way))
    return None


def _numbers(way: Mapping[str, Any]) -> Rank:
    rate = _PCIE_LANE_GBPS * way["width"]
    return (len(way["redirects"]), way["host_bridge"], way["iommu"], -rate, way["hops"])
