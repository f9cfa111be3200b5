# SPDX-License-Identifier: Apache-2.0
"""The switches of one machine, for its models: reads its PCI tree when asked, decides with it.

It lives in the supervisor. A tree that was read is good until the machine's log says that something
has changed (:data:`testbed.machine.pci_tree.CHANGE_EVENTS`), so every answer carries the length
that the log had before the tree was read: who finds such a line beyond it asks again. QEMU writes
the line before the change takes effect and keeps its lock until it has, and answers QMP under the
same lock: a tree read after the line was seen shows the change.

Nothing is read, traced or connected before the first question.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from testbed.machine.monitor import Monitor, MonitorLost, MonitorRefused
from testbed.machine.pci_tree import CHANGE_EVENTS, PciTree, TreeUnreadable, read_tree
from testbed.models.fabric import Claim, decide
from testbed.models.spec import MachineSpec, MemorySpec

READ_TIMEOUT_S: Final = 2.0  # one of 26 bridges takes 26 ms, on an overloaded host 200


class NoTree(Exception):
    """The machine's tree cannot be read; the text says why."""


class Survey(NamedTuple):
    """A tree, and the length of the log before it was read; -1 if nobody logs changes."""

    tree: PciTree
    as_of: int


class Switchyard:
    """``functions`` are the models' devices by QEMU's identifier, with their names."""

    def __init__(
        self,
        machine: MachineSpec,
        memories: tuple[MemorySpec, ...],
        functions: Mapping[str, str],
    ) -> None:
        self._machine = machine
        self._memories = {(m.function, m.bar): m.name for m in memories if m.function}
        self._devices = functions
        self._functions = {name: function for function, name in functions.items()}
        self._monitor: Monitor | None = None
        self._logs_changes = False
        self._survey: Survey | None = None
        self._turn = asyncio.Lock()
        self._complained = False

    async def routes(self, device: str, seen: int | None = None) -> dict[str, Any]:
        """What becomes of a device's requests, as of a log of at least ``seen`` bytes (None: as of
        now); for JSON.

        :raises NoTree: QEMU does not say.
        """
        survey = await self._read(self._log_bytes() if seen is None else seen)
        claims = decide(survey.tree, self._functions.get(device, ""))
        return {"as_of": survey.as_of, "routes": [self._entry(claim) for claim in claims]}

    async def tree(self) -> list[dict[str, Any]]:
        """The tree as it is now, parents before children; for JSON. NoTree if QEMU does not say."""
        survey = await self._read(self._log_bytes())
        return [
            {
                "function": f.qemu_id,
                "bdf": f.bdf,
                "parent": f.parent,
                "bars": [
                    {"bar": b.index, "address": b.range.start, "size_bytes": b.range.size_bytes}
                    for b in f.bars
                ],
                "bridge": f.bridge
                and {
                    **{k: v for k, v in f.bridge._asdict().items() if k not in ("windows", "acs")},
                    "windows": [
                        {"address": w.start, "size_bytes": w.size_bytes} for w in f.bridge.windows
                    ],
                    "acs": f.bridge.acs and f.bridge.acs._asdict(),
                },
            }
            for f in survey.tree.functions
        ]

    def close(self) -> None:
        """Let go of QEMU."""
        if self._monitor is not None:
            self._monitor.close()

    def _entry(self, claim: Claim) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "address": claim.range.start,
            "size_bytes": claim.range.size_bytes,
            "outcome": claim.outcome.value,
            "why": claim.why,
        }
        if claim.function or claim.bar >= 0:
            entry |= {
                "function": claim.function,
                "bar": claim.bar,
                "offset": claim.offset,
                "memory": self._memories.get((claim.function, claim.bar)),
                "device": self._devices.get(claim.function),
            }
        return entry

    async def _read(self, seen: int) -> Survey:
        async with self._turn:
            known = self._survey
            alive = self._monitor is not None and self._monitor.is_open
            if known is not None and alive and 0 <= seen <= known.as_of:
                return known
            self._survey = None
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    monitor = await self._connected()
                    as_of = self._log_bytes() if self._logs_changes else -1
                    execute = partial(monitor.execute, timeout_s=READ_TIMEOUT_S)
                    self._survey = Survey(await read_tree(execute), as_of)
            except TimeoutError:
                self._drop()
                raise NoTree(f"QEMU did not tell its tree within {READ_TIMEOUT_S:g} s") from None
            except (MonitorLost, MonitorRefused, TreeUnreadable) as error:
                self._drop()
                raise NoTree(str(error)) from error
            return self._survey

    async def _connected(self) -> Monitor:
        if self._monitor is None or not self._monitor.is_open:
            self._monitor = await Monitor.connect(self._machine.monitor, timeout_s=READ_TIMEOUT_S)
            self._logs_changes = await self._trace_changes(self._monitor)
        return self._monitor

    async def _trace_changes(self, monitor: Monitor) -> bool:
        try:
            for event in CHANGE_EVENTS:
                await monitor.execute(
                    "trace-event-set-state",
                    {"name": event, "enable": True},
                    timeout_s=READ_TIMEOUT_S,
                )
        except MonitorRefused as error:
            why = str(error)
        else:
            if self._log_bytes() >= 0:
                return True
            why = f"there is no {self._machine.log}"
        if not self._complained:
            self._complained = True
            sys.stderr.write(
                f"models: QEMU does not log changes of its PCI tree ({why}): routes are read anew"
                " only after a reset or a write to a device's own configuration space\n"
            )
        return False

    def _log_bytes(self) -> int:
        try:
            return self._machine.log.stat().st_size
        except OSError:
            return -1

    def _drop(self) -> None:
        """An answer that is late must meet no other question, so a new connection is made."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
