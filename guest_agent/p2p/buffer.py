# SPDX-License-Identifier: Apache-2.0
"""Buffers with the semantics of dma-buf: attach, pin, map, unmap, invalidate, move, revoke.

As drivers/dma-buf/dma-buf.c of Linux 7.2 (``dma_buf_dynamic_attach``, ``dma_buf_map_attachment``,
``dma_buf_invalidate_mappings``), with the exporter's side of the 2025-09 discussion: it knows what
its active importers reach, offers only that, and never moves the bytes to where one of them cannot
follow.
"""

from __future__ import annotations

import contextlib

from guest_agent.p2p import moves, revoke, rules
from guest_agent.p2p.attachment import Attachment, Live, Mapping
from guest_agent.p2p.errors import (
    FenceFailedError,
    GoneError,
    NoPathError,
    NoRoomError,
    ReachError,
    RevokedError,
    RuleError,
    StaleError,
    UnsupportedError,
)
from guest_agent.p2p.interconnect import Placement
from guest_agent.p2p.resv import Reservation, Usage, locked
from guest_agent.p2p.storage import Storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from guest_agent.p2p.addresses import Address
    from guest_agent.p2p.attachment import Importer
    from guest_agent.p2p.core import Core
    from guest_agent.p2p.fence import Fence
    from guest_agent.p2p.interconnect import Offer, Path
    from guest_agent.p2p.rules import Task


class Buffer:
    """A buffer and those who import it. Made by :meth:`Core.export`."""

    def __init__(
        self,
        core: Core,
        name: str,
        device: str,
        size_bytes: int,
        offers: Sequence[Offer],
        placements: tuple[Placement, ...],
        resv: Reservation | None,
    ) -> None:
        self.core = core
        self.name = name
        self.device = device
        self.size_bytes = size_bytes
        self.offers = tuple(offers)
        self.placements = placements
        self.resv = resv or Reservation(name)
        self.attachments: list[Attachment] = []
        self.revoked = ""  # why
        self.failure: Exception | None = None
        self.moves = 0
        self._telling = False
        self.storage = self._first_storage()

    @property
    def placement(self) -> Placement:
        """Where the bytes are, or are on their way to."""
        return self.storage.backing.placement

    def _first_storage(self) -> Storage:
        for index, placement in enumerate(self.placements):
            try:
                return self.allocate(placement)
            except NoRoomError:
                if index + 1 == len(self.placements):
                    raise
        raise NoRoomError(f"{self.name} may be placed nowhere")

    def allocate(self, placement: Placement) -> Storage:
        """Memory for all of it. :raises NoRoomError: there is not enough; says what is pinned."""
        core = self.core
        try:
            backing = core.backend.allocate(self.device, placement, self.size_bytes)
        except NoRoomError as error:
            pinned = "; ".join(core.pinned(self.device, placement)) or "nothing"
            raise NoRoomError(f"{self.name}: {error}; pinned there: {pinned}") from error
        return Storage(core.backend, backing)

    def pinned_by(self) -> list[str]:
        """The importers that keep it from moving."""
        return [
            each.importer.name
            for each in self.attachments
            if each.pins or each.is_pinned_by_mapping
        ]

    # --- checks

    def check_locked(self, task: Task, call: str) -> None:
        """:raises RuleError: the task does not hold the reservation lock."""
        task.must_hold(self.resv, rules.LOCKED, f"{call} of {self.name}")

    def check_usable(self) -> None:
        """:raises RevokedError: it was revoked. :raises FenceFailedError: its bytes were lost."""
        if self.revoked:
            raise RevokedError(f"{self.name} was revoked: {self.revoked}")
        if self.failure is not None:
            raise FenceFailedError(f"the bytes of {self.name} were lost: {self.failure}")

    # --- attach and detach

    def attach(self, task: Task, importer: Importer) -> Attachment:
        """Choose an interconnect and attach. The lock is not held.

        If the importer reaches no placement that the bytes are in, they are moved for all to one
        that all reach, if there is one.

        :raises RuleError: the lock is held.
        :raises RevokedError: the memory was taken away.
        :raises UnsupportedError: EOPNOTSUPP: the memory is peer-to-peer only, and the importer is
            static, does no peer-to-peer, or is not revocable.
        :raises NoPathError: EINVAL: no path that leaves no active importer behind.
        :raises NoRoomError: the bytes would have to be moved, and there is no room.
        """
        task.must_not_hold(self.resv, rules.UNLOCKED, f"attach to {self.name}")
        with self.core.events.span("attach", f"{importer.name} on {self.name}") as span:
            self.check_usable()
            suited = self._suited(importer)
            with locked(task, self.resv):
                allowed = [each for each in suited if self._may_be_in(each)]
                path = self.core.negotiate(
                    f"{importer.name} on {self.name}", self.offers, importer.offers, allowed
                ).path
                if path.placement is not self.placement:
                    moves.move(self, task, path.placement, span.number)
                attachment = Attachment(self, importer, path)
                self.attachments.append(attachment)
            span.details["path"] = str(path)
        return attachment

    def _suited(self, importer: Importer) -> list[Placement]:
        """The placements for such an importer: one that cannot be told to let go, or reaches no
        device memory, has the bytes in RAM or not at all."""
        if importer.is_revocable and importer.does_peer_to_peer:
            return list(self.placements)
        if Placement.SYSTEM in self.placements:
            return [Placement.SYSTEM]
        if not importer.dynamic:
            what = "is static"
        else:
            what = "is not revocable" if importer.does_peer_to_peer else "does no peer-to-peer"
        raise UnsupportedError(f"{self.name} is peer-to-peer only, and {importer.name} {what}")

    def _may_be_in(self, placement: Placement) -> bool:
        if placement is self.placement:
            return True
        if self.pinned_by():
            return False
        try:
            moves.paths_after(self, placement)
        except NoPathError:
            return False
        return True

    def detach(self, task: Task, attachment: Attachment) -> None:
        """Undo :meth:`attach`. The lock is not held.

        :raises RuleError: the lock is held.
        :raises StaleError: it is still mapped or pinned, or not attached.
        """
        task.must_not_hold(self.resv, rules.UNLOCKED, f"detach from {self.name}")
        if attachment not in self.attachments:
            raise StaleError(f"{attachment} is not attached")
        if attachment.mappings:
            raise StaleError(f"{attachment} still has {len(attachment.mappings)} mappings")
        if attachment.pins:
            raise StaleError(f"{attachment} is still pinned")
        if attachment.live is not None:
            self.end_live(attachment, attachment.live)
        self.attachments.remove(attachment)
        self.core.events.note("detach", str(attachment))

    def importer_died(self, task: Task, attachment: Attachment, why: str) -> None:
        """Clean up after an importer that is no more: its fences fail, its mappings go, the others
        go on. The lock is not held."""
        task.must_not_hold(self.resv, rules.UNLOCKED, f"detach from {self.name}")
        gone = GoneError(f"{attachment.importer.name} died: {why}")
        with self.core.events.span("died", str(attachment), why=why), locked(task, self.resv):
            for fence in attachment.fences:
                self.core.graph.fail(fence, gone)
                if not fence.is_signalled():
                    fence.signal(gone)
            attachment.pins = 0
            revoke.take_away(attachment)
            self.attachments.remove(attachment)

    # --- map and unmap

    def map(self, task: Task, attachment: Attachment, writable: bool) -> Mapping:
        """See :meth:`Attachment.map`."""
        self.check_locked(task, "map")
        if self._telling:
            raise RuleError(rules.MAP_AFTERWARDS, f"map of {self.name} by {attachment}")
        self.check_usable()
        if attachment not in self.attachments:
            raise StaleError(f"{attachment} is not attached")
        live = self._live(attachment, writable)
        live.count += 1
        ready = self.resv.fences(Usage.KERNEL)
        mapping = Mapping(attachment, live, ready)
        attachment.mappings[mapping.number] = mapping
        self.core.events.note("map", str(attachment), address=str(live.address), future=bool(ready))
        return mapping

    def _live(self, attachment: Attachment, writable: bool) -> Live:
        """The attachment's address, mapped so that it can be read or written."""
        live = attachment.live
        if live is not None and live.count:
            if writable and not live.writable:
                raise UnsupportedError(f"{attachment} is mapped read-only already")
            return live
        backend, path = self.core.backend, attachment.path
        try:
            refused = backend.reach(path)
            if refused is not None:
                raise OSError(refused.code, refused.reason)
            if live is None:
                address = backend.reserve(self.storage.backing, path)
                live = attachment.live = Live(self.storage.take(), path, address)
            backend.map(live.storage.backing, path, live.address, writable=writable)
        except OSError as error:
            if attachment.live is not None:  # an address that cannot be used is not kept
                self.end_live(attachment, attachment.live)
            name = attachment.importer.name
            raise ReachError(f"{name} offered {path} and cannot use it: {error}", name) from error
        live.writable = writable
        return live

    def unmap(self, task: Task, attachment: Attachment, mapping: Mapping) -> None:
        """See :meth:`Attachment.unmap`."""
        self.check_locked(task, "unmap")
        if attachment.mappings.get(mapping.number) is not mapping:
            what = "unmapped twice" if mapping.closed else "none of this attachment"
            raise StaleError(f"{mapping} is {what}")
        del attachment.mappings[mapping.number]
        mapping.closed = True
        mapping.live.count -= 1
        if mapping.live.count == 0:
            self._unmap_live(mapping.live)
            if mapping.live in attachment.stale:
                self.end_live(attachment, mapping.live)
        self.core.events.note("unmap", str(attachment))

    def _unmap_live(self, live: Live) -> None:
        self.core.backend.unmap(live.storage.backing, live.path, live.address)

    def end_live(self, attachment: Attachment, live: Live) -> None:
        """Take the address away from the device, and let go of the memory."""
        if attachment.live is live:
            attachment.live = None
        else:
            attachment.stale.remove(live)
        if live.count:
            self._unmap_live(live)
            live.count = 0
        self.core.backend.release(live.path, live.address)
        live.storage.drop()

    # --- access

    def submit(
        self,
        task: Task,
        attachment: Attachment,
        mapping: Mapping,
        name: str,
        begin: Callable[[Address], Fence | None],
        write: bool,
    ) -> Fence:
        """See :meth:`Attachment.submit`."""
        self.check_locked(task, "submit")
        mapping.check()
        self.resv.reserve(task)
        needs = list({id(f): f for f in (*mapping.ready, *self.resv.fences(Usage.KERNEL))}.values())
        after = self.resv.fences(Usage.to_wait_for(write))
        address = mapping.live.address
        verb = "write" if write else "read"
        with self.core.events.span("submit", str(attachment), what=f"{verb} {name}"):
            operation = self.core.graph.add(name, lambda: begin(address), after, needs)
        if not operation.fence.is_signalled():
            self.add_fence(task, attachment, operation.fence, Usage.WRITE if write else Usage.READ)
        return operation.fence

    def add_fence(self, task: Task, attachment: Attachment, fence: Fence, usage: Usage) -> None:
        """Publish an importer's fence, and remember whose it is. The lock is held.

        :raises RuleError: the lock is not held.
        """
        self.resv.reserve(task)
        self.resv.add(task, fence, usage)
        attachment.fences = [each for each in attachment.fences if not each.is_signalled()]
        attachment.fences.append(fence)

    # --- moves and revocation

    def invalidate(self, task: Task) -> None:
        """Tell all importers that what they have mapped goes away. The lock is held.

        :raises RuleError: the lock is not held.
        """
        task.must_hold(self.resv, rules.EXPORTER_LOCKED, f"invalidate {self.name}")
        for attachment in list(self.attachments):
            self.tell(task, attachment)

    def tell(self, task: Task, attachment: Attachment) -> None:
        """Tell one importer. The lock is held."""
        live = attachment.live
        if live is not None and live.count:
            live.invalidated_ns = self.core.clock.now_ns()
            attachment.stale.append(live)
            attachment.live = None
        elif live is not None:
            self.end_live(attachment, live)
        callback = attachment.importer.invalidate
        if callback is None or not attachment.importer.dynamic:
            return
        self._telling = True
        # What a callback raises is in the event; the others must still be told.
        with (
            contextlib.suppress(Exception),
            self.core.events.span("invalidate", str(attachment)),
        ):
            callback(task, attachment)
        self._telling = False

    def renegotiate(
        self, task: Task, attachment: Attachment, failed: Collection[Path] = ()
    ) -> Path:
        """Choose again, after the path was lost: another one to where the bytes are now.

        The lock is held; the path that there was may be chosen again, unless it is in ``failed``.

        :raises RuleError: the lock is not held.
        :raises StaleError: it is mapped: an attachment's address is stable for as long.
        :raises NoPathError: there is none.
        """
        self.check_locked(task, "renegotiate")
        if attachment.mappings:
            raise StaleError(f"{attachment} is mapped, and keeps its path for as long")
        path = self.core.negotiate(
            str(attachment), self.offers, attachment.importer.offers, [self.placement], failed
        ).path
        if attachment.live is not None:
            self.end_live(attachment, attachment.live)
        attachment.path = path
        return attachment.path

    def move(self, task: Task, placement: Placement, cause: int = 0) -> Fence:
        """Move the bytes. See :func:`moves.move`."""
        return moves.move(self, task, placement, cause)

    def revoke(self, task: Task, why: str) -> None:
        """Take the memory away. See :func:`revoke.revoke`."""
        revoke.revoke(self, task, why)

    def unrevoke(self, task: Task) -> None:
        """Give it back. See :func:`revoke.unrevoke`."""
        revoke.unrevoke(self, task)

    def release(self, task: Task) -> None:
        """The exporter is through with it. The lock is not held. :raises StaleError: attached."""
        task.must_not_hold(self.resv, rules.UNLOCKED, f"release {self.name}")
        if self.attachments:
            names = ", ".join(each.importer.name for each in self.attachments)
            raise StaleError(f"{self.name} is still attached: {names}")
        self.resv.wait(self.core.clock, Usage.BOOKKEEP)
        del self.core.buffers[self.name]
        self.storage.drop()
