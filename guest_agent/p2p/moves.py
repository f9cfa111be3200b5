# SPDX-License-Identifier: Apache-2.0
"""Moving a buffer's bytes to another placement, for all importers, behind fences.

The 2020-10 discussion of dma_resv and ODP describes what GPU drivers do: nobody waits; the copy is
queued behind all that is under way, importers are given mappings of the new place at once, and
what they queue waits for the copy's fence (KERNEL). A list of buffers moves wholly or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from guest_agent.p2p import rules
from guest_agent.p2p.errors import NoPathError, PinnedError, UnsupportedError
from guest_agent.p2p.resv import Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest_agent.p2p.attachment import Attachment
    from guest_agent.p2p.buffer import Buffer
    from guest_agent.p2p.fence import Fence
    from guest_agent.p2p.interconnect import Path, Placement
    from guest_agent.p2p.rules import Task
    from guest_agent.p2p.storage import Storage


@dataclass(frozen=True)
class _Prepared:
    """All that can fail has been done."""

    buffer: Buffer
    storage: Storage
    paths: Sequence[tuple[Attachment, Path]]
    event: int  # what prepared it


def paths_after(buffer: Buffer, placement: Placement) -> list[tuple[Attachment, Path]]:
    """The path that each active importer would have with the bytes there.

    :raises NoPathError: one has none.
    """
    paths = []
    for each in buffer.attachments:
        subject = f"{each} in {placement.value} memory"
        outcome = buffer.core.negotiate(subject, buffer.offers, each.importer.offers, [placement])
        paths.append((each, outcome.path))
    return paths


def move(buffer: Buffer, task: Task, placement: Placement, cause: int = 0) -> Fence:
    """Move one buffer; returns the fence of the copy. The lock is held. Nothing waits.

    On an error nothing has changed.

    :raises RuleError: the lock is not held.
    :raises RevokedError: the memory was taken away.
    :raises PinnedError: EBUSY: an importer pins it; names it.
    :raises UnsupportedError: an active importer does not reach that placement; names it.
    :raises NoRoomError: there is no room.
    """
    return move_all(task, [(buffer, placement)], cause)[0]


def move_all(task: Task, wanted: Sequence[tuple[Buffer, Placement]], cause: int = 0) -> list[Fence]:
    """Move several buffers, all or none; the fences of the copies. All locks are held.

    Errors as :func:`move`.
    """
    prepared: list[_Prepared] = []
    try:
        for buffer, placement in wanted:
            prepared.append(_prepare(buffer, task, placement))
    except BaseException:
        for each in prepared:
            each.storage.drop()
        raise
    return [_commit(each, task, cause) for each in prepared]


def _prepare(buffer: Buffer, task: Task, placement: Placement) -> _Prepared:
    task.must_hold(buffer.resv, rules.EXPORTER_LOCKED, f"move {buffer.name}")
    buffer.check_usable()
    pinned = buffer.pinned_by()
    if pinned:
        raise PinnedError(f"{buffer.name} is pinned by {', '.join(pinned)}")
    if placement not in buffer.placements:
        raise UnsupportedError(f"{buffer.name} cannot be in {placement.value} memory")
    way = f"{buffer.name}: to {placement.value} memory"
    with buffer.core.events.span("prepare", buffer.name, way=way) as span:
        try:
            paths = paths_after(buffer, placement)
        except NoPathError as error:
            raise UnsupportedError(
                f"{buffer.name} cannot move to {placement.value} memory: {error}"
            ) from error
        return _Prepared(buffer, buffer.allocate(placement), paths, span.number)


def _commit(prepared: _Prepared, task: Task, cause: int) -> Fence:
    buffer = prepared.buffer
    core = buffer.core
    old, new = buffer.storage, prepared.storage
    source, target = old.backing, new.backing
    what = f"{buffer.name}: {source.placement.value} → {target.placement.value}"
    with core.events.span("move", buffer.name, cause or prepared.event, way=what):
        buffer.invalidate(task)
        for attachment, path in prepared.paths:
            attachment.path = path
        buffer.resv.reserve(task)
        busy = buffer.resv.fences(Usage.BOOKKEEP)
        needs = buffer.resv.fences(Usage.KERNEL)
        operation = core.graph.add(
            f"copy of {what}", lambda: core.backend.copy(source, target), busy, needs
        )
        buffer.storage = new
        buffer.moves += 1
        # The buffer's hold on the old memory becomes the copy's.
        operation.fence.when_signalled(lambda fence: _copied(buffer, old, fence))
        if not operation.fence.is_signalled():
            buffer.resv.add(task, operation.fence, Usage.KERNEL)
    return operation.fence


def _copied(buffer: Buffer, old: Storage, fence: Fence) -> None:
    buffer.failure = buffer.failure or fence.error
    old.drop()
