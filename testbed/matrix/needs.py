# SPDX-License-Identifier: Apache-2.0
"""What a cell needs of the machine it runs on, and what a machine has for cells. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from testbed.topology.model import Gpu, Topology
from testbed.topology.units import GIB, MIB

# A QEMU beside its guest's memory, the models' process and the harness, each about 100 MiB
# (`testbed bench memory`).
OVERHEAD_BYTES = 400 * MIB
# For the rest of the system; what is still free when a guest turns out larger than was thought.
RESERVE_BYTES = GIB
# The resources of Dask's workers, as they declare them.
MEMORY, CORES, KVM = "memory", "cores", "kvm"


@dataclass(frozen=True)
class Need:
    """Memory in bytes, processors that it keeps busy, and whether KVM has to work."""

    memory_bytes: int = 0
    cores: int = 0
    kvm: bool = False


@dataclass(frozen=True)
class Room:
    """What one machine has for racks: at most ``slots`` at once, with these together.

    ``asked``  what the user asked for, or 0.
    """

    slots: int
    cores: int
    memory_bytes: int
    asked: int = 0

    def holds(self, need: Need, used: Need, running: int) -> bool:
        """May one more start? One that is alone may always have all processors."""
        if running == 0:
            return True
        return (
            running < self.slots
            and used.cores + need.cores <= self.cores
            and used.memory_bytes + need.memory_bytes <= self.memory_bytes
        )

    def too_large(self, need: Need) -> str:
        """Why it can never run here, or ""."""
        if need.memory_bytes <= self.memory_bytes:
            return ""
        wanted, has = need.memory_bytes / GIB, self.memory_bytes / GIB
        return f"{wanted:.1f} GiB of memory; {has:.1f} GiB can be had here"

    def words(self, needs: list[Need]) -> str:
        """How many will run at once, and what limits that."""
        largest = max((need.memory_bytes for need in needs), default=0)
        cores = max((need.cores for need in needs), default=0)
        found = {
            f"-j {self.asked or self.slots}": self.slots,
            f"{self.cores} processors": self.cores // cores if cores else self.slots,
            f"{self.memory_bytes / GIB:.1f} GiB of memory": (
                self.memory_bytes // largest if largest else self.slots
            ),
            f"{len(needs)} in all": len(needs),
        }
        least = max(1, min(found.values()))
        why = next(words for words, number in found.items() if max(1, number) == least)
        return f"{least} at once, limited by {why}"


def room_here(asked: int | None) -> Room:
    """What this machine has now; ``asked`` is ``-j``, None for as many as fit."""
    from testbed.host.facts import available_memory  # noqa: PLC0415  pure without it

    cores = len(os.sched_getaffinity(0))
    memory_bytes = max(0, available_memory() - RESERVE_BYTES)
    return Room(asked or cores, cores, memory_bytes, asked or 0)


def need_of(topology: Topology, *, kvm: bool = False) -> Need:
    """What the machines of one rack take.

    An emulated virtual CPU keeps a processor busy; of several machines those that are not spoken
    to wait, except while they boot, which then takes longer.
    """
    memory_bytes = cores = 0
    for node in topology.nodes.values():
        video = sum(e.vram_bytes for e in node.entries() if isinstance(e, Gpu))
        memory_bytes += node.machine.memory_bytes + video + OVERHEAD_BYTES
        cores = max(cores, node.machine.vcpus)
    return Need(memory_bytes, cores, kvm)


def sum_of(needs: list[Need]) -> Need:
    """All of them at once."""
    return Need(sum(n.memory_bytes for n in needs), sum(n.cores for n in needs))


@dataclass(frozen=True)
class Worker:
    """One worker as the scheduler sees it."""

    address: str
    threads: int
    resources: Mapping[str, float]


def needed(need: Need, known: Mapping[str, float]) -> dict[str, float]:
    """A cell's need in Dask's words; only what some worker of the cluster declares."""
    wanted: dict[str, float] = {MEMORY: need.memory_bytes, CORES: need.cores, KVM: need.kvm}
    return {name: amount for name, amount in wanted.items() if amount and name in known}


def missing(need: Need, workers: Sequence[Worker]) -> str:
    """Why no worker can ever run it, or "". Pure."""
    most: dict[str, float] = {}
    for worker in workers:
        for name, amount in worker.resources.items():
            most[name] = max(amount, most.get(name, 0))
    if need.kvm and not most.get(KVM):
        return "no worker declares the resource 'kvm'"
    wanted = needed(need, most)
    if any(
        all(worker.resources.get(name, 0) >= amount for name, amount in wanted.items())
        for worker in workers
    ):
        return ""
    short = [name for name, amount in wanted.items() if most[name] < amount]
    if short == [MEMORY]:
        largest = most[MEMORY] / GIB
        return f"{need.memory_bytes / GIB:.1f} GiB of memory; the largest worker has {largest:.1f}"
    words = ", ".join(f"{amount:g} of '{name}'" for name, amount in wanted.items())
    return f"no worker has {words}"
