# SPDX-License-Identifier: Apache-2.0
"""Where a scenario takes place: one core on the devices, and by name all that was made in it."""

from __future__ import annotations

import errno

from guest_agent import rpc
from guest_agent.p2p.attachment import Importer
from guest_agent.p2p.clock import MonotonicClock
from guest_agent.p2p.core import Core
from guest_agent.p2p.hmm import OwnerGroups
from guest_agent.p2p.interconnect import Constraints, Kind, Offer, Placement
from guest_agent.p2p.policies import policy_of
from guest_agent.p2p.report import Refusal
from guest_agent.p2p.resv import locked
from guest_agent.p2p.rules import Task
from guest_agent.p2p.topology import topology_from
from guest_agent.p2p_device.backend import DeviceBackend
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping as Object
    from typing import Any, TypeVar

    from guest_agent.hw.memory import Buffers
    from guest_agent.p2p.attachment import Attachment, Mapping
    from guest_agent.p2p.buffer import Buffer
    from guest_agent.p2p.fence import Fence
    from guest_agent.p2p.hmm import Mirror
    from guest_agent.p2p.interconnect import Path
    from guest_agent.p2p.odp import OnDemand
    from guest_agent.p2p_device.members import Member

    T = TypeVar("T")

UNMAP_TIMEOUT_NS = 300_000_000
FENCE_TIMEOUT_NS = 20_000_000_000
_OFFER = {"kind": "str", "device": "str"}
_OFFER_MAY = {
    "port": "str",
    "placements": "list[str]",
    "accepts_p2p": "bool",
    "requires_p2p": "bool",
}


class HostForwarder:
    """Asks the host about virtual interconnects: the question stands until the host answers.

    The host calls the agent, never the other way round; so an attach that has to ask ends with
    EAGAIN, the host reads the question, answers, and lets it be tried again.
    """

    def __init__(self) -> None:
        self.questions: list[tuple[str, str]] = []  # the ports that shall meet
        self.answers: dict[tuple[str, str], Refusal | None] = {}

    def forward(self, path: Path) -> Refusal | None:
        """See :meth:`Forwarder.forward`."""
        question = (_end(path.exporter), _end(path.importer))
        if question in self.answers:
            return self.answers[question]
        if question not in self.questions:
            self.questions.append(question)
        raise OSError(errno.EAGAIN, f"the host is asked whether {' and '.join(question)} meet")


class Room:
    """:param topology: ``{pcie, system, links}``: see :func:`topology_from`."""

    def __init__(
        self,
        members: dict[str, Member],
        buffers: Buffers,
        topology: Object[str, Any],
        policy: str,
        *,
        forwards: bool,
    ) -> None:
        clock = MonotonicClock()
        known = topology_from(topology)
        self.links = known.links
        self.backend = DeviceBackend(members, buffers, clock)
        self.forwarder = HostForwarder() if forwards else None
        self.core = Core(
            self.backend,
            known,
            clock,
            policy=policy_of(policy),
            forwarder=self.forwarder,
            unmap_timeout_ns=UNMAP_TIMEOUT_NS,
            fence_timeout_ns=FENCE_TIMEOUT_NS,
        )
        self.broken = False  # a deliberate break is in force
        self.exporter = Task("exporter")
        self.attachments: dict[str, Attachment] = {}
        self.mappings: dict[str, Mapping] = {}
        self.fences: dict[str, Fence] = {}
        self.on_demand: dict[str, OnDemand] = {}
        self.mirrors: dict[str, Mirror] = {}
        self.owners = OwnerGroups(self.are_linked)

    def know(self, topology: Object[str, Any]) -> None:
        """From now on these are the facts."""
        known = topology_from(topology)
        self.links = known.links
        self.core.topology = known

    def forward(self, forwarder: HostForwarder | None) -> None:
        """From now on the host is asked through this one, or nobody is."""
        self.forwarder = self.core.forwarder = forwarder

    def are_linked(self, one: str, other: str) -> bool:
        """Whether a private link joins two devices."""
        return any({end[0] for end in link.ends} == {one, other} for link in self.links)

    # --- what steps name

    def buffer(self, name: str) -> Buffer:
        """:raises ParameterError: there is none."""
        return _named("buffer", self.core.buffers, name)

    def attachment(self, name: str) -> Attachment:
        """:raises ParameterError: there is none."""
        return _named("attachment", self.attachments, name)

    def mapping(self, name: str) -> Mapping:
        """The latest mapping of that attachment. :raises ParameterError: there is none."""
        return _named("mapping", self.mappings, name)

    def fence(self, name: str) -> Fence:
        """:raises ParameterError: there is none."""
        return _named("fence", self.fences, name)

    def importer_on_demand(self, name: str) -> OnDemand:
        """:raises ParameterError: there is none."""
        return _named("importer", self.on_demand, name)

    def mirror(self, name: str) -> Mirror:
        """:raises ParameterError: there is none."""
        return _named("name", self.mirrors, name)

    def task(self, attachment: Attachment) -> Task:
        """The thread of an importer's driver."""
        return Task(attachment.importer.name)

    def importer(self, name: str, offers: list[Offer], how: Object[str, Any]) -> Importer:
        """A driver that imports. ``how``: ``dynamic``, ``revocable``, ``polite`` (it unmaps when
        it is told to); all of them unless it is said.
        """

        def told(task: Task, attachment: Attachment) -> None:
            if not how.get("polite", True):
                return
            under_way = [fence for fence in attachment.fences if not fence.is_signalled()]
            if under_way:  # its engine cannot be stopped: it unmaps when that is through
                under_way[-1].when_signalled(
                    lambda _: self.core.graph.defer(lambda: self._let_go(attachment))
                )
            else:
                self._unmap_all(task, attachment)

        invalidate = told if how.get("revocable", True) else None
        return Importer(name, tuple(offers), how.get("dynamic", True), invalidate)

    def _unmap_all(self, task: Task, attachment: Attachment) -> None:
        for mapping in list(attachment.mappings.values()):
            self.backend.invalidate(mapping.live.path, mapping.live.address)
            attachment.unmap(task, mapping)

    def _let_go(self, attachment: Attachment) -> None:
        resv = attachment.buffer.resv
        if resv.holder is not None:
            self.core.graph.defer(lambda: self._let_go(attachment))
            return
        task = self.task(attachment)
        with locked(task, resv):
            for mapping in list(attachment.mappings.values()):
                if mapping.live in attachment.stale:
                    self.backend.invalidate(mapping.live.path, mapping.live.address)
                    attachment.unmap(task, mapping)

    def settle(self, timeout_ns: int = 10_000_000_000) -> int:
        """Let everything queued happen; returns how much is left."""
        clock = self.core.clock
        until_ns = clock.now_ns() + timeout_ns
        self.core.graph.pump()
        while len(self.core.graph) and clock.now_ns() < until_ns:
            clock.pause(until_ns)
            self.core.graph.pump()
        return len(self.core.graph)

    def clean(self) -> list[str]:
        """End everything that is left in the room, whatever state it is in; what would not go."""
        problems = []
        for member in self.backend.members.values():
            if member.vram is not None:
                member.go_on()
        self.backend.liars.clear()
        self.backend.refusals.clear()
        self.settle()
        for mirror in self.mirrors.values():
            mirror.invalidate()
            self.backend.free(mirror.page.backing)
        for buffer in list(self.core.buffers.values()):
            for attachment in list(buffer.attachments):
                buffer.importer_died(Task("the end"), attachment, "the room is cleaned")
            self.settle()
            try:
                buffer.release(Task("the end"))
            except OSError as error:
                problems.append(f"{buffer.name}: {error}")
        for named in (
            self.attachments, self.mappings, self.fences, self.on_demand, self.mirrors
        ):  # fmt: skip
            named.clear()
        self.owners = OwnerGroups(self.are_linked)
        return problems

    def lock(self, task: Task, *buffers: Buffer) -> Any:
        """Lock their reservations for a block."""
        return locked(task, *(buffer.resv for buffer in buffers))


def offers_of(name: str, values: list[Any]) -> list[Offer]:
    """:raises ParameterError: what is wrong with a list of offers."""
    offers = []
    for index, value in enumerate(values):
        where = f"{name}[{index}]"
        rpc.check(where, value, "dict[str, Any]")
        rpc.check_parts(where, value, _OFFER, _OFFER_MAY)
        offers.append(
            Offer(
                Kind.parse(value["kind"]),
                value["device"],
                value.get("port", ""),
                placements_of(where, value.get("placements", ["device"])),
                Constraints(
                    accepts_p2p=value.get("accepts_p2p", True),
                    requires_p2p=value.get("requires_p2p", False),
                ),
            )
        )
    return offers


def placements_of(name: str, words: list[str]) -> tuple[Placement, ...]:
    """:raises ParameterError: one is neither ``device`` nor ``system``."""
    try:
        return tuple(Placement(word) for word in words)
    except ValueError:
        raise ParameterError(f"{name}.placements: device and system, not {words}") from None


def _named(what: str, table: Object[str, T], name: str) -> T:
    if name not in table:
        raise ParameterError(f"{what}: there is no {name!r}")
    return table[name]


def _end(offer: Offer) -> str:
    return f"{offer.device}:{offer.port}"
