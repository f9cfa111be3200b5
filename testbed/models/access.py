# SPDX-License-Identifier: Apache-2.0
"""How a device's engines reach memory: spaces that resolve addresses, and a mover that moves bytes.

A *space* is one kind of address: the device's own memory, the bus above it, a link, a virtual
address. It answers with a :class:`Window`: either a view, and the bytes move here at the speed of
memcpy, or none, and they go by message. The *mover* copies between any two spaces, tells the
witness of every access with the path it took, and lets the rules of fault injection have their say.

No view is kept while the event loop runs: an unmap may come in between, and has to hold at once.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from enum import IntEnum
from typing import Final, NamedTuple

from testbed.models.inject import Action, Rule, Rules
from testbed.models.memory import SharedMemory
from testbed.models.pacing import Transfer
from testbed.models.witness import Event, Path, Witness

CHUNK_BYTES: Final = 8 << 20  # after so much links, the host and other devices have their turn
COMMAND_BYTES: Final = 64 << 10  # what a small copy takes in time, about
BOUNCE_BYTES: Final = 1 << 20  # how much is moved at once when it has to pass through this process
MAX_READ_BYTES: Final = 16 << 20  # what one read may keep: its size often comes from the guest
READ_TIMEOUT_S: Final = 0.05  # a dropped read, as the completion time-out of a real device
REFAULTS: Final = 16  # how often a copy's source may vanish while its target is repaired


class Cause(IntEnum):
    """Why an access failed; the numbers are those of the GPU's ERROR_CODE register."""

    REFUSED = 1  # the IOMMU (or the root complex) refused the address
    NO_BUS_MASTER = 2  # the guest does not let the function do DMA
    TIMEOUT = 3  # no completion
    POISONED = 4  # the data was marked bad on its way
    OUT_OF_RANGE = 5  # outside the device's memory
    LINK_DOWN = 6  # the link is not up
    LINK_REFUSED = 7  # the other end does not export that address
    PAGE_FAULT = 8  # no translation, and the fault was cancelled
    BAD_COMMAND = 9  # not an access: the command makes no sense
    DEVICE_GONE = 10  # the machine is disconnected


class AccessError(Exception):
    """An access that failed; ``address`` is on the path it took."""

    def __init__(self, cause: Cause, address: int, *, write: bool) -> None:
        super().__init__(f"{cause.name.lower()} at {address:#x} ({'write' if write else 'read'})")
        self.cause = cause
        self.address = address
        self.write = write


class Window(NamedTuple):
    """The start of an access: ``size_bytes`` that one target holds, by one path.

    ``space`` and ``address`` say whom to ask when there is no view.
    """

    size_bytes: int
    view: memoryview | None
    path: Path
    target: str
    space: Space
    address: int


class Space(ABC):
    """One kind of address; ``path`` is the one that an access takes if it gets nowhere."""

    path = Path.LOCAL

    @abstractmethod
    def reach(self, address: int, size_bytes: int, *, write: bool) -> Window:
        """What stands at ``address``, at most ``size_bytes`` of it. AccessError if nothing can."""

    def book(self, window: Window, size_bytes: int, began_s: float, *, write: bool) -> float:
        """When that much of a transfer that began then has arrived, where timing is modelled
        (monotonic clock); 0.0 otherwise.
        """
        del window, size_bytes, began_s, write  # for subclasses
        return 0.0

    async def ready(self, address: int, *, write: bool) -> None:  # noqa: B027 - most have nothing to do
        """Wait until :meth:`reach` has an answer for ``address`` (a page fault is served here)."""

    async def fetch(self, address: int, size_bytes: int) -> bytes:
        """Read what :meth:`reach` gave no view of. AccessError if it is refused."""
        raise NotImplementedError

    async def store(self, address: int, data: bytes) -> None:
        """Write it, likewise."""
        raise NotImplementedError


class LocalSpace(Space):
    """A device's own memory, by offset."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory

    def reach(self, address: int, size_bytes: int, *, write: bool) -> Window:
        """See :meth:`Space.reach`; OUT_OF_RANGE beyond the end."""
        end = min(address + size_bytes, self.memory.size_bytes)
        if address >= end:
            raise AccessError(Cause.OUT_OF_RANGE, address, write=write)
        view = self.memory.view[address:end]
        return Window(end - address, view, Path.LOCAL, self.memory.name, self, address)


class Mover:
    """Moves bytes for one device. At most one of its methods runs at a time for one engine."""

    def __init__(self, witness: Witness, rules: Rules) -> None:
        self.witness = witness
        self.rules = rules
        self._turn = CHUNK_BYTES  # left until the others have theirs, over all commands of a batch
        self._held: tuple[Space, int, bytes] | None = None  # the write that a rule put back

    async def copy(
        self,
        source: Space,
        source_address: int,
        target: Space,
        target_address: int,
        size_bytes: int,
    ) -> None:
        """Copy; AccessError at the first access that fails, with what came before it done."""
        transfer = Transfer()
        done = 0
        while done < size_bytes:
            left = min(size_bytes - done, self._turn)
            read, write = await self._both(
                source, source_address + done, target, target_address + done, left
            )
            size = write.size_bytes
            if read.view is not None and write.view is not None and not self.rules:
                write.view[:size] = read.view[:size]
                self._saw(read, size, write=False)
                self._saw(write, size, write=True)
                self._passes(transfer, read, size, write=False)
                self._passes(transfer, write, size, write=True)
            else:
                size = min(size, BOUNCE_BYTES)
                data = await self._read_all(source, source_address + done, size, transfer)
                await self._write_all(target, target_address + done, data, transfer)
            done += size
            await transfer.keep_pace()
            self._turn -= max(size, COMMAND_BYTES)
            if self._turn <= 0:
                self._turn = CHUNK_BYTES
                await asyncio.sleep(0)
        await transfer.end()

    async def fill(self, target: Space, address: int, size_bytes: int, pattern: bytes) -> None:
        """Repeat ``pattern`` over ``size_bytes``; AccessError as for :meth:`copy`."""
        unit = min(BOUNCE_BYTES, size_bytes)
        whole = pattern * (unit // len(pattern) + 2)
        transfer = Transfer()
        done = 0
        while done < size_bytes:
            size = min(unit, size_bytes - done)
            start = done % len(pattern)
            data = whole[start : start + size]
            await self._write_all(target, address + done, data, transfer)
            done += size
            await transfer.keep_pace()
            await asyncio.sleep(0)
        await transfer.end()

    async def read(self, space: Space, address: int, size_bytes: int) -> bytes:
        """Read all of it, or AccessError; also for more than :data:`MAX_READ_BYTES`."""
        if size_bytes > MAX_READ_BYTES:
            raise AccessError(Cause.BAD_COMMAND, address, write=False)
        transfer = Transfer()
        data = await self._read_all(space, address, size_bytes, transfer)
        await transfer.end()
        return data

    async def write(self, space: Space, address: int, data: bytes) -> None:
        """Write all of it, or AccessError."""
        transfer = Transfer()
        await self._write_all(space, address, data, transfer)
        await transfer.end()

    async def _read_all(
        self, space: Space, address: int, size_bytes: int, transfer: Transfer
    ) -> bytes:
        parts = []
        done = 0
        while done < size_bytes:
            at = address + done
            await space.ready(at, write=False)
            window = self._reach(space, at, min(size_bytes - done, BOUNCE_BYTES), write=False)
            parts.append(await self._read(window, transfer))
            done += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _write_all(self, space: Space, address: int, data: bytes, transfer: Transfer) -> None:
        done = 0
        while done < len(data):
            at = address + done
            await space.ready(at, write=True)
            window = self._reach(space, at, len(data) - done, write=True)
            await self._write(window, data[done : done + window.size_bytes], transfer)
            done += window.size_bytes

    async def fetch_add(self, space: Space, address: int, operand: int, size_bytes: int) -> int:
        """Add to a little-endian integer and answer what it was.

        Atomic among the models of this process; not towards the guest's CPUs or another node.
        """
        old = int.from_bytes(await self.read(space, address, size_bytes), "little")
        new = (old + operand) % (1 << 8 * size_bytes)
        await self.write(space, address, new.to_bytes(size_bytes, "little"))
        return old

    async def _both(
        self, source: Space, source_address: int, target: Space, target_address: int, size: int
    ) -> tuple[Window, Window]:
        """Both ends of a copy at once. While the target's page fault is repaired, the source's page
        may go away again: then it is asked for anew, but not for ever.
        """
        for _ in range(REFAULTS):
            await source.ready(source_address, write=False)
            await target.ready(target_address, write=True)
            try:
                read = source.reach(source_address, size, write=False)
            except AccessError as error:
                if error.cause is Cause.PAGE_FAULT:
                    continue
                break
            return read, self._reach(target, target_address, read.size_bytes, write=True)
        read = self._reach(source, source_address, size, write=False)
        return read, self._reach(target, target_address, read.size_bytes, write=True)

    def _reach(self, space: Space, address: int, size_bytes: int, *, write: bool) -> Window:
        try:
            return space.reach(address, size_bytes, write=write)
        except AccessError as error:
            self._failed(error, space.path, size_bytes)
            raise

    def _failed(self, error: AccessError, path: Path, size_bytes: int) -> None:
        self.witness.access(
            path,
            error.address,
            size_bytes,
            "",
            write=error.write,
            outcome=error.cause.name.lower(),
        )

    def _saw(self, window: Window, size_bytes: int, *, write: bool, outcome: str = "ok") -> None:
        self.witness.access(
            window.path, window.address, size_bytes, window.target, write=write, outcome=outcome
        )

    def _strike(self, window: Window, *, write: bool) -> Rule | None:
        if not self.rules:
            return None
        rule = self.rules.judge(window.path, window.address, window.size_bytes, write=write)
        if rule is not None:
            self.witness.event(
                Event.INJECTED, address=window.address, detail=f"{rule.name}: {rule.action}"
            )
        return rule

    async def _read(self, window: Window, transfer: Transfer) -> bytes:
        """The window's bytes; fewer if it shrank while a rule held the access up."""
        rule = self._strike(window, write=False)
        action = rule.action if rule else None
        if rule is not None and action in (Action.DELAY, Action.DROP):
            await asyncio.sleep(rule.delay_s or READ_TIMEOUT_S)
            if action is Action.DROP:
                raise self._mishap(Cause.TIMEOUT, window, write=False)
            window = self._reach(window.space, window.address, window.size_bytes, write=False)
        data = await self._get(window)
        if action is Action.POISON:
            raise self._mishap(Cause.POISONED, window, write=False)
        if rule is not None and action is Action.CORRUPT:
            data = self.rules.corrupt(rule, data)
        self._passes(transfer, window, len(data), write=False)
        return data

    async def _write(self, window: Window, data: bytes, transfer: Transfer) -> None:
        rule = self._strike(window, write=True)
        action = rule.action if rule else None
        if action is Action.DROP:
            self._saw(window, len(data), write=True, outcome="dropped")
            return
        if action is Action.POISON:
            raise self._mishap(Cause.POISONED, window, write=True)
        if action is Action.REORDER and self._held is None:
            self._held = (window.space, window.address, data)
            return
        if rule is not None and action is Action.DELAY:
            await asyncio.sleep(rule.delay_s)
            await self._put_all(window.space, window.address, data)
        else:
            if rule is not None and action is Action.CORRUPT:
                data = self.rules.corrupt(rule, data)
            await self._put(window, data)
        self._passes(transfer, window, len(data), write=True)
        if self._held is not None:
            await self.flush()

    async def flush(self) -> None:
        """Let a write that a rule put back happen now; engines do so before they go idle."""
        if self._held is not None:
            held, self._held = self._held, None
            await self._put_all(*held)

    @staticmethod
    def _passes(transfer: Transfer, window: Window, size_bytes: int, *, write: bool) -> None:
        transfer.passes(window.space.book(window, size_bytes, transfer.began_s, write=write))

    def _mishap(self, cause: Cause, window: Window, *, write: bool) -> AccessError:
        error = AccessError(cause, window.address, write=write)
        self._failed(error, window.path, window.size_bytes)
        return error

    async def _get(self, window: Window) -> bytes:
        if window.view is not None:
            data = bytes(window.view)
        else:
            try:
                data = await window.space.fetch(window.address, window.size_bytes)
            except AccessError as error:
                self._failed(error, window.path, window.size_bytes)
                raise
        self._saw(window, len(data), write=False)
        return data

    async def _put_all(self, space: Space, address: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            window = self._reach(space, address + done, len(data) - done, write=True)
            await self._put(window, data[done : done + window.size_bytes])
            done += window.size_bytes

    async def _put(self, window: Window, data: bytes) -> None:
        if window.view is not None:
            window.view[:] = data
        else:
            try:
                await window.space.store(window.address, data)
            except AccessError as error:
                self._failed(error, window.path, window.size_bytes)
                raise
        self._saw(window, len(data), write=True)
