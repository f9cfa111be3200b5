# SPDX-License-Identifier: Apache-2.0
"""Faults on purpose in a test (the fixture ``faults``), taken back when it ends.

::

    def test_survives_a_lost_write(rack, faults, witness, observe):
        faults.arm("gpu0", "drop write nth=3")
        with witness("gpu0") as watch:
            ...
        assert watch.seen.events["injected"] == 1
"""

from __future__ import annotations

from typing import Any

from testbed.errors import HostError, TestbedError
from testbed.harness.racks import LiveRack
from testbed.instruments.devices import LinkChange, ModelDevice, find_device

_BY = "test"


class Faults:
    """What a test lets go wrong. Devices are named ``gpu0``, or ``host0/gpu0``."""

    def __init__(self, rack: LiveRack) -> None:
        self._rack = rack
        self._touched: dict[str, ModelDevice] = {}
        self._broken = False  # something was done that cannot be undone

    def arm(self, device: str, *rules: str) -> None:
        """Arm rules in words, such as ``drop write nth=3``. InputError if they are none."""
        self._touch(device).arm(*rules, by=_BY)

    def struck(self, device: str) -> int:
        """How many accesses were struck by the rules that are armed now."""
        return sum(rule["struck"] for rule in self._touch(device).rules())

    def stick(self, device: str, *, on: bool = True) -> None:
        """Its engine takes no command any more, or goes on."""
        self._touch(device).stick(on=on, by=_BY)

    def lose(self, device: str, what: str, count: int = 1) -> None:
        """Lose its next ``doorbell`` or ``interrupt``, or several."""
        self._touch(device).lose(what, count, by=_BY)

    def link(self, device: str, peer: str, change: str) -> dict[str, Any]:
        """Its link to ``peer``: ``down``, ``up``, ``narrow=4``, ``slow=1GB/s,5us``, ``restore``."""
        return self._touch(device).change_link(peer, LinkChange.parse(change), by=_BY)

    def remove(self, device: str) -> None:
        """Pull the card out. The tests after this one get a fresh rack, if it is the session's."""
        self._touch(device).remove(by=_BY)
        self._broken = True

    def kill(self, device: str) -> None:
        """Kill its model's process; a fresh rack afterwards, likewise."""
        found = self._touch(device)
        self._broken = True
        found.kill()
        del self._touched[str(found)]

    def disarm(self) -> None:
        """Take everything back. A HostError, and so an ERROR of the test, if that cannot be.

        A rack whose machine is dead, or one that ends here, has nothing to take back.
        """
        touched, self._touched = self._touched, {}
        if not self._rack.is_running or self._rack.is_dead:
            return
        wrong: list[str] = []
        for name, device in touched.items():
            try:
                device.restore()
            except TestbedError as error:
                wrong.append(f"faults of {name} could not be taken back: {error.message}")
        if self._rack.ours and (wrong or self._broken):
            self._rack.renew()
        if wrong:
            raise HostError("; ".join(wrong))

    def _touch(self, word: str) -> ModelDevice:
        device = find_device(self._rack.nodes, word)
        return self._touched.setdefault(str(device), device)
