# SPDX-License-Identifier: Apache-2.0
"""Doing the steps in which devices move bytes, watched for faults and for the paths taken."""

from __future__ import annotations

from testbed.instruments.bench import Bench, CopyStatus, Engine
from testbed.instruments.paths import PathWatch
from testbed.instruments.storage import TRANSFER_BYTES
from testbed.reports.holdings import Holdings
from testbed.reports.memory_actions import MemoryActions
from testbed.reports.references import Scope, resolve
from testbed.reports.seen import Seen
from testbed.reports.steps import Copy, Transfer, Write32
from testbed.results.evidence import Note
from testbed.topology.plan import Role


def copy(held: Holdings, step: Copy | Write32, scope: Scope) -> Seen:
    """Let a device's engine copy, or write four bytes."""
    bench, engine = _engine(held, step.engine)
    target = resolve(step.target, scope)
    with bench.watch() as watch, PathWatch(engine.witness) as paths:
        if isinstance(step, Copy):
            source = resolve(step.source, scope)
            size_bytes = step.size_bytes
            status: CopyStatus = engine.copy(source, target, size_bytes)
        else:
            size_bytes = 4
            status = engine.write32(target, resolve(step.value, scope))
    values = {
        "completed": status.completed,
        "bytes": status.copied_bytes,
        "faults": watch.window.count,
    }
    return Seen(
        values,
        window=watch.window,
        moved=paths.moved() if engine.witness is not None else None,
        device=engine.function.device,
        size_bytes=size_bytes,
        evidence=status.evidence,
    )


def _engine(held: Holdings, word: str) -> tuple[Bench, Engine]:
    node, functions = held.functions(word)
    opened = held.opened(node, functions[0].device)
    scratch = None
    if opened.is_raw:
        # Rings where the device reaches them past any IOMMU: in its own memory, if it has one.
        plan = held.rack.plan.nodes[node]
        memories = [f for f in plan.by_role(Role.VRAM) if f.device in opened.devices]
        memories.sort(key=lambda f: f.device != functions[0].device)
        scratch = opened.bench.vram(memories[0]) if memories else None
    function = next(f for f in functions if f.role is Role.ENGINE)
    return opened.bench, opened.bench.engine(function, scratch=scratch)


def transfer(held: Holdings, memories: MemoryActions, step: Transfer) -> Seen:
    """Direct I/O of a disk into peer-to-peer memory, or out of it."""
    node, functions = held.functions(step.client)
    provided = memories.provided[step.memory]
    done = memories.disks_of(node).transfer(functions[0], provided, write=step.write)
    claim = Note(f"the kernel says it moved {done.moved_bytes} bytes, errno {done.error or 0}")
    values = {
        "bytes": done.moved_bytes,
        "errno": done.error,
        "faults": done.faults.count,
        "lines": "\n".join(done.log),
    }
    return Seen(
        values,
        window=done.faults,
        size_bytes=TRANSFER_BYTES,
        lines=done.log,
        evidence=(claim,),
    )
