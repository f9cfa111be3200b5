# SPDX-License-Identifier: Apache-2.0
"""The record of a run in parts: what each part ran on, by its label."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from testbed.matrix.apart import Apart, Part, _Ended
from testbed.matrix.needs import Need, Room
from testbed.results.record import RunRecord
from tests.unit.page.run_folder import run_record

LABELS = ("quad-gpu-p2p-iommu", "minimal-p2p-iommu")


def merged(*runs: RunRecord) -> RunRecord:
    parts = [Part(label, (), Need()) for label in LABELS]
    apart = Apart(parts, Path("/runs/x"), Room(1, 1, 1), ["testbed", "run"])
    for label, run in zip(LABELS, runs, strict=True):
        apart._ended[label] = _Ended(list(run.outcomes), run)
    return apart._record([], datetime.now(UTC), 1.0, None)


def test_each_parts_rack_devices_and_kernel_are_in_the_record() -> None:
    one, two = run_record(name="quad-gpu"), run_record(name="minimal")
    kernels = {"generic": {"release": "6.12"}}
    made = merged(one, replace(two, versions={**two.versions, "kernels": kernels}))
    assert made.topology == {}
    assert [each["rack"] for each in made.topologies.values()] == ["quad-gpu", "minimal"]
    assert list(made.topologies) == list(LABELS)
    racks = [f"{label}/{rack}" for label in LABELS for rack in ("rack", "rack-2")]
    assert [device.rack for device in made.devices] == racks
    assert list(made.versions["kernels"]) == ["default", "generic"]


def test_of_equal_racks_the_record_has_the_one() -> None:
    run = run_record(name="quad-gpu")
    assert merged(run, run).topology == run.topology
