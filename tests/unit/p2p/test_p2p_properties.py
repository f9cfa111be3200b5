# SPDX-License-Identifier: Apache-2.0
"""Whatever importers and exporter do, in any order: what must hold for bytes, places and fences."""

from __future__ import annotations

import graphlib

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from guest_agent.p2p import revoke
from guest_agent.p2p.addresses import Address
from guest_agent.p2p.attachment import Attachment, Importer, Mapping
from guest_agent.p2p.backend import Backing
from guest_agent.p2p.errors import (
    FutureError,
    NoPathError,
    OverdueError,
    PinnedError,
    RevokedError,
    RuleError,
    StaleError,
    UnsupportedError,
)
from guest_agent.p2p.fence import Fence
from guest_agent.p2p.interconnect import Kind, NoWay, Offer, Placement
from guest_agent.p2p.resv import Usage, locked
from guest_agent.p2p.rules import Task
from tests.unit.p2p.machines import DEVICE, SYSTEM, Machine, gpu_offers, offer, tree

SIZE = 8192
OFFERS: dict[str, tuple[Offer, ...]] = {
    "gpu1": gpu_offers("gpu1", [(Kind.XGMI, "x01")]),
    "link only": (offer(Kind.XGMI, "gpu1", "x01"),),
    "gpu2": gpu_offers("gpu2"),
    "nic": gpu_offers("nic0.0"),
    "disk": (offer(Kind.SYSTEM, "disk"),),
    "static": gpu_offers("nic0.0"),
    "rude": gpu_offers("nic0.0"),
}


class Exchange(RuleBasedStateMachine):
    """One buffer, importers of every sort, and a shadow of its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(tree(no_host_bridge=True), keep_events=10)
        self.buffer = self.machine.export(size_bytes=SIZE)
        self.shadow = bytearray(SIZE)
        self.copying: dict[int, Fence] = {}  # by the number of the target
        self.revocations = 0
        # what makes an address change → the address; the attachment keeps its identity its own
        self.known: dict[tuple[int, int, int], tuple[Attachment, Address]] = {}
        self.task = Task("test")
        backend = self.machine.backend
        plain = backend.copy

        def copy(source: Backing, target: Backing) -> Fence:
            self.copying[target.number] = fence = plain(source, target)
            return fence

        backend.copy = copy  # type: ignore[method-assign]

    # --- importers

    def importer(self, sort: str) -> Importer:
        def careful(task: Task, attachment: Attachment) -> None:
            if sort != "rude" and all(fence.is_signalled() for fence in attachment.fences):
                for mapping in list(attachment.mappings.values()):
                    attachment.unmap(task, mapping)

        if sort == "static":
            return Importer(sort, OFFERS[sort], dynamic=False)
        return Importer(sort, OFFERS[sort], invalidate=careful)

    def pick(self, number: int) -> Attachment | None:
        attachments = self.buffer.attachments
        return attachments[number % len(attachments)] if attachments else None

    def usable(self, attachment: Attachment | None) -> Mapping | None:
        if attachment is None:
            return None
        for mapping in attachment.mappings.values():
            if mapping.live is attachment.live:
                return mapping
        return None

    @rule(sort=st.sampled_from(sorted(OFFERS)))
    def attach(self, sort: str) -> None:
        if len(self.buffer.attachments) > 6:
            return
        before = [(each.importer.name, each.path) for each in self.buffer.attachments]
        try:
            self.buffer.attach(self.task, self.importer(sort))
        except (NoPathError, RevokedError):
            assert before == [(each.importer.name, each.path) for each in self.buffer.attachments]

    @rule(number=st.integers(0, 9))
    def detach(self, number: int) -> None:
        attachment = self.pick(number)
        if attachment is not None:
            try:
                self.buffer.detach(self.task, attachment)
            except StaleError:
                assert attachment.mappings or attachment.pins

    @rule(number=st.integers(0, 9))
    def map(self, number: int) -> None:
        attachment = self.pick(number)
        if attachment is None:
            return
        with locked(self.task, self.buffer.resv):
            try:
                mapping = attachment.map(self.task)
            except RevokedError:
                assert self.buffer.revoked
                return
        assert not self.buffer.revoked
        key = (id(attachment), self.buffer.moves, self.revocations)
        assert self.known.setdefault(key, (attachment, mapping.planned))[1] == mapping.planned

    @rule(number=st.integers(0, 9))
    def unmap(self, number: int) -> None:
        attachment = self.pick(number)
        if attachment is None or not attachment.mappings:
            return
        if any(not fence.is_signalled() for fence in attachment.fences):
            return  # an honest importer unmaps when its work is done
        mapping = next(iter(attachment.mappings.values()))
        with locked(self.task, self.buffer.resv):
            attachment.unmap(self.task, mapping)

    @rule(number=st.integers(0, 9), pin=st.booleans())
    def pin(self, number: int, pin: bool) -> None:
        attachment = self.pick(number)
        if attachment is None:
            return
        with locked(self.task, self.buffer.resv):
            try:
                if pin:
                    attachment.pin(self.task)
                else:
                    attachment.unpin(self.task)
            except (RuleError, StaleError, RevokedError):
                pass

    @rule(number=st.integers(0, 9), why=st.just("killed"))
    def die(self, number: int, why: str) -> None:
        attachment = self.pick(number)
        if attachment is not None and number > 7:
            # What it had queued never happens: the shadow must not expect it.
            self.buffer.importer_died(self.task, attachment, why)

    # --- bytes

    @rule(
        number=st.integers(0, 9),
        at=st.integers(0, SIZE - 16),
        data=st.binary(min_size=1, max_size=16),
    )
    def write(self, number: int, at: int, data: bytes) -> None:
        attachment = self.pick(number)
        mapping = self.usable(attachment)
        if mapping is None or attachment is None or self.buffer.revoked:
            return

        def begin(address: Address) -> None:
            self.check_arrived(mapping)
            self.machine.backend.write(address, at, data)
            self.shadow[at : at + len(data)] = data

        with locked(self.task, self.buffer.resv):
            fence = attachment.submit(self.task, mapping, "write", begin, write=True)
        fence.when_signalled(self.check_no_assertion)

    @rule(number=st.integers(0, 9))
    def read(self, number: int) -> None:
        attachment = self.pick(number)
        mapping = self.usable(attachment)
        if mapping is None or attachment is None or self.buffer.revoked:
            return

        def begin(address: Address) -> None:
            self.check_arrived(mapping)
            assert self.machine.backend.read(address, 0, SIZE) == bytes(self.shadow)

        with locked(self.task, self.buffer.resv):
            fence = attachment.submit(self.task, mapping, "read", begin, write=False)
        fence.when_signalled(self.check_no_assertion)

    def check_no_assertion(self, fence: Fence) -> None:
        assert not isinstance(fence.error, AssertionError), fence.error

    def check_arrived(self, mapping: Mapping) -> None:
        """No access before its fence: nothing may be on its way to where the access goes."""
        copy = self.copying.get(mapping.live.storage.backing.number)
        assert copy is None or copy.is_signalled(), "access before its fence"
        assert all(fence.is_signalled() for fence in mapping.ready), "access before its fence"

    @rule(number=st.integers(0, 9))
    def look(self, number: int) -> None:
        mapping = self.usable(self.pick(number))
        if mapping is None or self.buffer.revoked:
            return
        try:
            address = mapping.address
        except FutureError:
            assert self.buffer.resv.fences(Usage.KERNEL)
            return
        self.check_arrived(mapping)
        if self.buffer.resv.is_idle(Usage.BOOKKEEP):
            assert self.machine.backend.read(address, 0, SIZE) == bytes(self.shadow)

    # --- the exporter

    @rule(placement=st.sampled_from([DEVICE, SYSTEM]))
    def move(self, placement: Placement) -> None:
        with locked(self.task, self.buffer.resv):
            try:
                self.buffer.move(self.task, placement)
            except PinnedError:
                assert self.buffer.pinned_by()
            except UnsupportedError:
                assert self.buffer.attachments
            except RevokedError:
                assert self.buffer.revoked

    @rule()
    def revoke(self) -> None:
        self.revocations += 1
        try:
            self.buffer.revoke(self.task, "reset")
        except OverdueError:
            assert self.buffer.attachments
        assert self.machine.backend.mapped() == 0

    @precondition(lambda self: self.buffer.revoked)
    @rule()
    def unrevoke(self) -> None:
        self.buffer.unrevoke(self.task)

    @rule(time_ns=st.sampled_from([100, 5000, 6 * 10**9]))
    def wait(self, time_ns: int) -> None:
        self.machine.settle()
        self.machine.clock.run(self.machine.clock.now_ns() + time_ns)
        self.machine.core.graph.pump()
        with locked(self.task, self.buffer.resv):
            try:
                revoke.enforce(self.buffer, self.task)
            except OverdueError:
                assert time_ns > 10**9

    # --- what always holds

    @invariant()
    def no_active_importer_is_left_behind(self) -> None:
        for attachment in self.buffer.attachments:
            path = attachment.path
            assert path.placement is self.buffer.placement
            assert path.importer in attachment.importer.offers
            assert path.exporter in self.buffer.offers
            assert path.placement in path.importer.placements
            facts = self.machine.topology.facts(path.exporter, path.importer, path.placement)
            assert not isinstance(facts, NoWay)

    @invariant()
    def the_graph_has_no_cycle(self) -> None:
        waiting = self.machine.core.graph._waiting
        graphlib.TopologicalSorter({k: set(op.after) for k, op in waiting.items()}).prepare()

    @invariant()
    def nothing_is_held_that_nobody_uses(self) -> None:
        lives = {
            id(live)
            for attachment in self.buffer.attachments
            for live in (attachment.live, *attachment.stale)
            if live is not None
        }
        assert self.machine.backend.reserved() == len(lives)
        assert self.machine.backend.mapped() <= len(lives)

    def teardown(self) -> None:
        self.machine.settle()
        for attachment in list(self.buffer.attachments):
            self.buffer.importer_died(self.task, attachment, "the test is over")
        self.machine.settle()
        if not self.buffer.revoked:
            last = self.buffer.attach(self.task, self.importer("gpu1"))
            self.machine.settle()
            mapping = self.machine.map(last)
            assert self.machine.read(mapping, 0, SIZE) == bytes(self.shadow)
            self.machine.unmap(last, mapping)
            self.buffer.detach(self.task, last)
        self.buffer.release(self.task)
        assert self.machine.backend.held() == 0
        assert self.machine.backend.mapped() == 0
        assert self.machine.backend.reserved() == 0
        assert len(self.machine.core.graph) == 0


TestExchange = Exchange.TestCase
TestExchange.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
