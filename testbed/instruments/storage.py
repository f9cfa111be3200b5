# SPDX-License-Identifier: Apache-2.0
"""NVMe disks and controller memory: peer-to-peer transfers that the guest's own kernel makes.

A provider is a disk with a controller memory buffer, which Linux makes peer-to-peer memory. A
client is another disk: direct I/O of the client into the provider's memory, and out of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from guest_agent.pattern import pattern
from testbed.errors import CapabilityMissing
from testbed.instruments.cases import path_between, route_between
from testbed.instruments.faults import FaultWatch, watch_machine
from testbed.instruments.interface import RackNode
from testbed.instruments.memory import by_machine
from testbed.instruments.mutations import Mutation
from testbed.instruments.translations import Translation, TranslationWatch
from testbed.results.evidence import Counter, Note
from testbed.results.judging import FaultWindow, Judgement, all_of, judge_bytes, judge_no_fault
from testbed.topology.oracle import Route
from testbed.topology.plan import Function, RackPlan, Role

TRANSFER_BYTES = 8192  # two pages, of which QEMU traces every word
PROVIDED_BYTES = 2 * TRANSFER_BYTES  # the second half is for what goes wrong


@dataclass(frozen=True)
class DiskPair:
    """``client`` reads and writes the controller memory of ``provider``."""

    node: str
    provider: Function
    client: Function
    route: Route

    switch: str = ""  # the one that both are below, if there is one

    def __str__(self) -> str:
        return f"{self.client.name}-{self.provider.name}"


def disk_pairs(plan: RackPlan) -> Iterator[DiskPair]:
    """All pairs of disks of which one has controller memory, as the topology wants its IOMMU."""
    for name, node in plan.nodes.items():
        disks = node.by_role(Role.NVME)
        for provider, client in permutations(disks, 2):
            if provider.options["cmb_bytes"]:
                spec = plan.topology.nodes[name]
                route = route_between(node, spec, client, provider)
                way = path_between(node, client, provider).split()
                switch = way[1] if way[0] == "switch" else ""
                yield DiskPair(name, provider, client, route, switch)


@dataclass(frozen=True)
class Transfer:
    """What one direct I/O did: the kernel's word, and what was seen of it meanwhile."""

    moved_bytes: int
    error: str
    faults: FaultWindow
    translations: tuple[Translation, ...]
    translations_watched: bool
    log: tuple[str, ...]

    def said(self, words: str) -> Judgement:
        """Did the kernel refuse it, and log why?"""
        lines = [line for line in self.log if words in line]
        evidence = (Note(f"errno {self.error or 0}"), *(Note(f"kernel: {x}") for x in lines[:3]))
        if self.error != "EINVAL" or self.moved_bytes:
            reason = f"the kernel moved {self.moved_bytes} bytes ({self.error or 'no error'})"
            return Judgement(False, f"{reason} instead of EINVAL", evidence)
        if not lines:
            return Judgement(False, f"EINVAL, but the kernel did not log '{words}'", evidence)
        return Judgement(True, f"EINVAL: {words}", evidence)

    def translated(self, *, identity: bool) -> Judgement:
        """Did the requester reach the memory by IOVAs of its own, or by the identity?"""
        if not self.translations_watched:
            return Judgement(True, "this machine's IOMMU shows no translations")
        evidence = tuple(
            Note(f"{t.requester} {t.iova:#x} → {t.physical:#x}") for t in self.translations[:4]
        )
        kind = "its bus address" if identity else "an IOVA of its own"
        if not self.translations:
            return Judgement(False, "no access to the memory was translated", evidence)
        if any(t.is_identity is not identity for t in self.translations):
            return Judgement(False, f"a page was not reached by {kind}", evidence)
        return Judgement(True, f"every page was reached by {kind}", evidence)


@dataclass(frozen=True)
class Provided:
    """Peer-to-peer memory of one provider, mapped into the agent."""

    node: RackNode = field(repr=False)
    provider: Function
    name: str
    physical: int

    @classmethod
    def of(cls, node: RackNode, provider: Function, kind: str = "p2p") -> Provided:
        """Allocate it. CapabilityMissing if the guest's kernel has none to give.

        :param kind: so that one provider can have several.
        """
        if provider.bdf not in node.agent.call("p2pmem.providers"):
            raise CapabilityMissing(
                f"peer-to-peer memory of {provider.name}: the kernel made none of its controller"
                " memory (CONFIG_PCI_P2PDMA, CONFIG_NVME_CORE)"
            )
        name = f"{kind}-{provider.name}"
        params: dict[str, Any] = {"provider": provider.bdf, "size_bytes": PROVIDED_BYTES}
        answer = node.agent.call("p2pmem.alloc", name=name, **params)
        return cls(node, provider, name, answer["physical"])

    @property
    def target(self) -> dict[str, str]:
        """How the agent names it."""
        return {"ram": self.name}

    def fill(self, seed: int) -> bytes:
        """Let the guest's CPU write the pattern of ``seed``, and return it."""
        self.node.agent.call(
            "memory.fill", target=self.target, size_bytes=TRANSFER_BYTES, seed=seed
        )
        return pattern(seed, 0, TRANSFER_BYTES)

    def judge(self, expected: bytes) -> Judgement:
        """Do the guest's CPU and the machine's own memory map read ``expected``?"""
        guest = self.node.agent.call(
            "memory.checksum", target=self.target, size_bytes=TRANSFER_BYTES
        )
        return judge_bytes(
            f"{self.provider.name}.cmb",
            TRANSFER_BYTES,
            hashlib.sha256(expected).hexdigest(),
            guest=guest["sha256"],
            host=hashlib.sha256(by_machine(self.node, self.physical, TRANSFER_BYTES)).hexdigest(),
        )

    def free(self) -> None:
        """Give it back."""
        self.node.agent.call("memory.free", name=self.name)


class Disks:
    """One node's disks, driven through its agent."""

    def __init__(self, node: RackNode, mutation: Mutation = Mutation.NONE) -> None:
        self.node = node
        self._mutation = mutation
        self._machine_watched = watch_machine(node)
        self._ram = "disk-buffer"
        node.agent.call("memory.alloc", name=self._ram, size_bytes=TRANSFER_BYTES)

    def close(self) -> None:
        """Give the buffer back."""
        self.node.agent.call("memory.free", name=self._ram)

    def fill(self, disk: Function, seed: int) -> bytes:
        """Put a pattern on the disk, from ordinary memory, and return it."""
        target = {"ram": self._ram}
        self.node.agent.call("memory.fill", target=target, size_bytes=TRANSFER_BYTES, seed=seed)
        self._plain(disk, write=True)
        return pattern(seed, 0, TRANSFER_BYTES)

    def judge(self, disk: Function, expected: bytes) -> Judgement:
        """Does the disk, read into ordinary memory, hold ``expected``?"""
        target = {"ram": self._ram}
        self.node.agent.call("memory.fill", target=target, size_bytes=TRANSFER_BYTES, seed=0)
        self._plain(disk, write=False)
        found = self.node.agent.call("memory.checksum", target=target, size_bytes=TRANSFER_BYTES)
        digest = hashlib.sha256(expected).hexdigest()
        return judge_bytes(disk.name, TRANSFER_BYTES, digest, guest=found["sha256"], host=None)

    def transfer(self, client: Function, provided: Provided, *, write: bool = False) -> Transfer:
        """Direct I/O between the client's disk and the provider's memory, watched."""
        agent = self.node.agent
        mark = agent.call("kmsg.mark")["sequence"]
        offset = TRANSFER_BYTES if self._mutation is Mutation.ELSEWHERE else 0
        with (
            TranslationWatch(self.node) as translations,
            FaultWatch(self.node, machine_watched=self._machine_watched) as faults,
        ):
            answer = agent.call(
                "nvme.transfer",
                device=client.bdf,
                target={**provided.target, "offset": offset},
                size_bytes=TRANSFER_BYTES,
                write=write,
            )
        records = agent.call("kmsg.since", sequence=mark)["records"]
        place = (client.bdf, provided.physical, TRANSFER_BYTES)
        return Transfer(
            answer["bytes"],
            answer["error"],
            faults.window,
            tuple(translations.into(*place)),
            translations.watched,
            tuple(record["text"] for record in records),
        )

    def _plain(self, disk: Function, *, write: bool) -> None:
        answer = self.node.agent.call(
            "nvme.transfer",
            device=disk.bdf,
            target={"ram": self._ram},
            size_bytes=TRANSFER_BYTES,
            write=write,
        )
        if answer["bytes"] != TRANSFER_BYTES:
            raise CapabilityMissing(f"ordinary I/O of {disk.name}: {answer['error']}")


def judge_read(transfer: Transfer, provided: Provided, expected: bytes) -> Judgement:
    """Did the kernel say that all was moved, do the bytes say so too, and was nothing refused?"""
    claim = Counter("the kernel says it moved", transfer.moved_bytes, "bytes")
    if transfer.moved_bytes != TRANSFER_BYTES:
        reason = f"the kernel moved {transfer.moved_bytes} bytes: {transfer.error or 'no error'}"
        return Judgement(False, reason, (claim, *(Note(line) for line in transfer.log[:3])))
    judgement = all_of(judge_no_fault(transfer.faults), provided.judge(expected))
    return Judgement(judgement.holds, judgement.reason, (claim, *judgement.evidence))
