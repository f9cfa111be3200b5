# SPDX-License-Identifier: Apache-2.0
"""What is kept of a rack's model devices in the record of a run."""

from __future__ import annotations

from testbed.devices import ModelDevice, model_devices
from testbed.errors import TestbedError
from testbed.results.record import ActionRecord, DeviceRecord, RuleRecord
from testbed.suites.interface import Rack


def records(rack: Rack, label: str) -> list[DeviceRecord]:
    """Every model device of a rack that is about to end; what cannot be asked any more is empty."""
    found: list[DeviceRecord] = []
    for device in model_devices(rack.nodes):
        try:
            found.append(_record(device, label))
        except TestbedError:  # the node is gone, and its models with it
            found.append(DeviceRecord(label, device.node, device.name))
    return found


def _record(device: ModelDevice, label: str) -> DeviceRecord:
    status = device.status()
    if status["lost"] is not None:
        return DeviceRecord(label, device.node, device.name, lost=status["lost"])
    report = device.report()
    return DeviceRecord(
        label,
        device.node,
        device.name,
        counters=report["counters"],
        rules=tuple(RuleRecord(**rule) for rule in report["rules"]),
        actions=tuple(ActionRecord(**action) for action in report["actions"]),
    )
