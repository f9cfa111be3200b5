# SPDX-License-Identifier: Apache-2.0
"""Taking memory away from importers, and finding those who do not let go.

The sequence is that of Linux 7.2 (``dma_buf_invalidate_mappings``,
drivers/vfio/pci/vfio_pci_dmabuf.c): no new mappings, tell the importers, wait for what is under way
(BOOKKEEP), and, without the lock, for the unmap. The kernel's last wait has no end; here it has a
deadline, after which the mappings are taken away and the importers named.
"""

from __future__ import annotations

from guest_agent.p2p import rules
from guest_agent.p2p.errors import FenceTimeoutError, OverdueError
from guest_agent.p2p.resv import Usage, locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.p2p.attachment import Attachment
    from guest_agent.p2p.buffer import Buffer
    from guest_agent.p2p.core import Core
    from guest_agent.p2p.interconnect import Path
    from guest_agent.p2p.rules import Task


def revoke(buffer: Buffer, task: Task, why: str) -> None:
    """Take the memory away from all importers: reset, memory decoding off, close.

    When this returns, or raises OverdueError, no device reaches the memory through a mapping, and
    map and attach fail with ENODEV until :func:`unrevoke`. The lock is not held.

    :raises RuleError: the lock is held.
    :raises OverdueError: importers that did not unmap in time, or whose work did not end; their
        mappings were taken away.
    """
    task.must_not_hold(buffer.resv, rules.WAIT_UNLOCKED, f"revoke {buffer.name}")
    core = buffer.core
    with core.events.span("revoke", buffer.name, why=why):
        until_ns = core.clock.now_ns() + core.unmap_timeout_ns
        late: list[str] = []
        with locked(task, buffer.resv):
            buffer.revoked = why
            buffer.invalidate(task)
            try:
                buffer.resv.wait(core.clock, Usage.BOOKKEEP, until_ns)
            except FenceTimeoutError:
                late = [
                    each.importer.name
                    for each in buffer.attachments
                    if any(not fence.is_signalled() for fence in each.fences)
                ]
        core.graph.pump()
        while _holding(buffer) and core.clock.now_ns() < until_ns:
            core.clock.pause(until_ns)
            core.graph.pump()
        late += [name for name in _holding(buffer) if name not in late]
        take_all_away(buffer)
        if late:
            names = ", ".join(late)
            raise OverdueError(
                f"{buffer.name} was taken away: {names} did not let go in time", late
            )


def unrevoke(buffer: Buffer, task: Task) -> None:
    """Let importers attach and map again. The lock is not held. :raises RuleError: it is."""
    task.must_not_hold(buffer.resv, rules.UNLOCKED, f"un-revoke {buffer.name}")
    with locked(task, buffer.resv):
        buffer.revoked = ""
    buffer.core.events.note("unrevoke", buffer.name)


def path_lost(core: Core, task: Task, is_lost: Callable[[Path], bool], why: str) -> list[str]:
    """A link went down, a node disappeared, a window was pulled out: tell whoever used it.

    Their mappings are taken away, so that their devices fault; all other importers of the same
    buffers go on. They may map again when the path is back, or renegotiate. No lock is held.

    :param is_lost: whether a path is affected.
    :returns: the attachments that were told.
    :raises RuleError: the task holds a reservation.
    """
    told = []
    for buffer in list(core.buffers.values()):
        affected = [each for each in buffer.attachments if is_lost(each.path)]
        if not affected:
            continue
        with core.events.span("path lost", buffer.name, why=why), locked(task, buffer.resv):
            for attachment in affected:
                buffer.tell(task, attachment)
                take_away(attachment)
                told.append(str(attachment))
    return told


def overdue(buffer: Buffer) -> list[str]:
    """The importers that keep a mapping longer than they may after it was invalidated."""
    limit_ns = buffer.core.clock.now_ns() - buffer.core.unmap_timeout_ns
    return [
        each.importer.name
        for each in buffer.attachments
        if any((live.invalidated_ns or 0) <= limit_ns for live in each.stale)
    ]


def enforce(buffer: Buffer, task: Task) -> None:
    """After a move: take overdue mappings away. The lock is held.

    :raises RuleError: the lock is not held.
    :raises OverdueError: there were some; names the importers. The others are not affected.
    """
    task.must_hold(buffer.resv, rules.EXPORTER_LOCKED, f"enforce on {buffer.name}")
    late = overdue(buffer)
    for attachment in buffer.attachments:
        if attachment.importer.name in late:
            _take_stale_away(attachment)
    if late:
        raise OverdueError(
            f"{', '.join(late)} did not unmap {buffer.name} in time after it had moved", late
        )


def _holding(buffer: Buffer) -> list[str]:
    return [each.importer.name for each in buffer.attachments if each.stale]


def take_all_away(buffer: Buffer) -> None:
    """Take every mapping away from every importer."""
    for attachment in buffer.attachments:
        take_away(attachment)


def take_away(attachment: Attachment) -> None:
    """Take every mapping away from an importer: its device faults from now on."""
    if attachment.live is not None:
        attachment.stale.append(attachment.live)
        attachment.live = None
    _take_stale_away(attachment)


def _take_stale_away(attachment: Attachment) -> None:
    for mapping in list(attachment.mappings.values()):
        if mapping.live in attachment.stale:
            mapping.closed = True
            del attachment.mappings[mapping.number]
    for live in list(attachment.stale):
        attachment.buffer.end_live(attachment, live)
        attachment.buffer.core.events.note("taken away", str(attachment))
