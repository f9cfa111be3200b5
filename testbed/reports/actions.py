# SPDX-License-Identifier: Apache-2.0
"""Doing the steps of a report on a running rack: each becomes what it saw, none judges.

Everything goes through the benches and disks of the suites, so that reports do what suites do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from testbed.errors import TestbedError
from testbed.instruments.interface import Rack
from testbed.reports import dma_actions, machine_actions
from testbed.reports.holdings import Holdings
from testbed.reports.machine_actions import KernelLogs
from testbed.reports.memory_actions import MemoryActions
from testbed.reports.model import Report
from testbed.reports.places import values_of_devices
from testbed.reports.seen import Seen
from testbed.reports.steps import (
    Acs,
    Buffer,
    Call,
    Checksum,
    Close,
    Config,
    Copy,
    Exec,
    Fill,
    Inject,
    KernelLog,
    Map,
    Module,
    Open,
    P2pMem,
    Pattern,
    Step,
    Transfer,
    Unmap,
    Unplug,
    Wait,
    Write32,
)


class Stage:
    """One report's rack while its steps are done; ``seen`` is by the names of steps."""

    def __init__(self, rack: Rack, report: Report) -> None:
        self.seen: dict[str, Seen] = {}
        self._devices = values_of_devices(rack.plan)
        self._held = Holdings(rack)
        self._memories = MemoryActions(self._held)
        self._logs = KernelLogs(self._held, report)

    @property
    def scope(self) -> dict[str, Mapping[str, Any]]:
        """What references can ask for by now."""
        return {**self._devices, **{name: seen.values for name, seen in self.seen.items()}}

    def perform(self, step: Step) -> Seen:  # noqa: PLR0911, PLR0912  one line a verb
        """Do one step.

        :raises TestbedError: it failed, or the machine did.
        """
        held, memories = self._held, self._memories
        match step:
            case Open():
                return held.open(step)
            case Close():
                return held.close(step)
            case Buffer():
                return memories.buffer(step)
            case Map():
                return memories.map(step)
            case Unmap():
                return memories.unmap(step)
            case Fill():
                return memories.fill(step)
            case Pattern():
                return memories.pattern(step)
            case Checksum():
                return memories.checksum(step)
            case P2pMem():
                return memories.p2pmem(step)
            case Copy() | Write32():
                return dma_actions.copy(held, step, self.scope)
            case Transfer():
                return dma_actions.transfer(held, memories, step)
            case Module():
                return machine_actions.module(held, step)
            case Acs():
                return machine_actions.acs(held, step)
            case Config():
                return machine_actions.config(held, step, self.scope)
            case Inject():
                return machine_actions.inject(held, step)
            case Unplug():
                return machine_actions.unplug(held, step)
            case Exec():
                return machine_actions.execute(held, step, self.scope)
            case Wait():
                return machine_actions.wait(held, step)
            case KernelLog():
                return self._logs.read(step)
            case Call():
                return machine_actions.call(held, step, self.scope)
        raise TestbedError(f"no action for a step '{step.kind}'")
