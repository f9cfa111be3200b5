# SPDX-License-Identifier: Apache-2.0
"""Engines that disagree about a requirement: a failure of its own."""

from __future__ import annotations

from typing import Any

import pytest

from testbed.harness.engines import agreement, labelled
from testbed.results.verdicts import Outcome, Verdict
from testbed.topology.model import from_data, to_data, with_overrides

PASS, FAIL, SKIP, LOST = Verdict.PASS, Verdict.FAIL, Verdict.SKIP, Verdict.LOST


def says(**verdicts: Verdict) -> list[Outcome]:
    return [
        Outcome((name.replace("_", "-"),), f"test_{name}", verdict)
        for name, verdict in verdicts.items()
    ]


@pytest.mark.parametrize(
    ("model", "igb", "expected", "words"),
    [
        (PASS, PASS, PASS, "say the same of 2 requirements"),
        (FAIL, FAIL, PASS, "say the same"),
        (PASS, FAIL, FAIL, "disagree about MAP-02 (PASS by model, FAIL by igb)"),
        (PASS, SKIP, PASS, "say the same"),
        (LOST, FAIL, PASS, "say the same"),
    ],
)
def test_agreement(model: Verdict, igb: Verdict, expected: Verdict, words: str) -> None:
    outcome = agreement(
        {"model": says(MAP_01=PASS, MAP_02=model), "igb": says(MAP_01=PASS, MAP_02=igb)}
    )
    assert outcome.verdict is expected
    assert words in outcome.reason
    assert bool(outcome.evidence) == (model is not igb and expected is PASS)


def test_nothing_shown_is_no_agreement() -> None:
    outcome = agreement({"model": says(MAP_01=SKIP), "igb": says(MAP_01=SKIP)})
    assert outcome.verdict is SKIP


def test_one_engine_alone_agrees_with_nobody() -> None:
    outcome = agreement({"model": says(MAP_01=PASS), "igb": says(MAP_01=SKIP)})
    assert outcome.verdict is SKIP
    assert "(model did)" in outcome.reason


def test_each_test_says_which_engine_it_was() -> None:
    (outcome,) = labelled("igb", says(MAP_01=PASS))
    assert outcome.title == "MAP-01 igb/test_MAP_01"


def test_an_engine_for_every_gpu_and_nic_below_whatever() -> None:
    device: dict[str, Any] = {"below": [{"gpu": "gpu0", "vram": "1M"}], "acs": "none"}
    device["below"][0]["faults"] = ["drop write nth=1"]
    tree = [
        {"root_port": "rp0", "below": [{"switch": "sw0", **device}]},
        {"nic": "nic0", "engine": "igb"},
        {"nvme": "disk0"},
    ]
    topology = from_data({"rack": "x", "nodes": {"host0": {"pcie": tree}}})
    root, nic, disk = to_data(with_overrides(topology, engine="edu"))["nodes"]["host0"]["pcie"]
    assert root["below"][0]["below"][0]["engine"] == nic["engine"] == "edu"
    assert "engine" not in disk
    assert not root["below"][0]["below"][0]["faults"]
