# SPDX-License-Identifier: Apache-2.0
"""What is kept of a rack's model devices in the record of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from testbed.errors import TestbedError
from testbed.instruments.devices import ModelDevice, model_devices, statuses
from testbed.instruments.interface import Rack
from testbed.results.record import ActionRecord, DeviceRecord, RuleRecord


def records(rack: Rack, label: str) -> list[DeviceRecord]:
    """Every model device of a rack that is about to end; what cannot be asked any more is empty."""
    found: list[DeviceRecord] = []
    for node in rack.nodes.values():
        devices = list(model_devices({node.name: node}))
        status: dict[str, Any] = {}
        if devices:
            with contextlib.suppress(TestbedError):  # the node is gone, and its models with it
                status = statuses(node)
        found += [_record(each, label, status.get(each.name)) for each in devices]
    return found


def _record(device: ModelDevice, label: str, status: Mapping[str, Any] | None) -> DeviceRecord:
    bare = DeviceRecord(label, device.node, device.name, lost=status["lost"] if status else None)
    if status is None or bare.lost is not None:
        return bare
    try:
        report = device.report()
    except TestbedError:  # it has just ended
        return bare
    return replace(
        bare,
        counters=report["counters"],
        rules=tuple(RuleRecord(**rule) for rule in report["rules"]),
        actions=tuple(ActionRecord(**action) for action in report["actions"]),
    )
