# SPDX-License-Identifier: Apache-2.0
"""The GPU model's whole driver: page tables, page faults, private links, batches of commands.

It takes a part of the GPU's video memory for itself: first the fault buffer, then page tables.
Registers and formats: docs/gpu-model.md.
"""

from __future__ import annotations

import errno
import struct

from guest_agent.hw import model_registers as hw
from guest_agent.hw.engine import PAGE_BYTES, Stopwatch
from guest_agent.hw.fault_buffer import BUFFER_BYTES, FaultBuffer
from guest_agent.hw.gpu_mmu import PageTables, TablePool
from guest_agent.hw.model import Model
from guest_agent.hw.model_batch import (
    COMMAND_VECTOR,
    ERROR_VECTOR,
    FAULT_VECTOR,
    LINK_VECTOR,
    SLICE_S,
    Batches,
    check_way,
)
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.hw.device import Device
    from guest_agent.hw.engine import Scratch
    from guest_agent.hw.region import Region

LEAST_VIDEO_BYTES = BUFFER_BYTES + 8 * PAGE_BYTES
MODES = {
    "closed": hw.EXPORT_CLOSED,
    "physical": hw.EXPORT_PHYSICAL,
    "virtual": hw.EXPORT_VIRTUAL,
}
_STATES = {hw.LINK_STATE_DOWN: "down", hw.LINK_STATE_UP: "up"}


class Gpu(Batches, Model):
    """:param video: the GPU's video memory, of which ``size_bytes`` from ``offset`` are its own.

    Space 0 is what the GPU's own commands use; others can be made, and exported over a link.
    """

    def __init__(
        self,
        device: Device,
        scratch: Scratch | None,
        video: Region,
        offset: int,
        size_bytes: int,
        *,
        replayable: bool = True,
    ) -> None:
        super().__init__(device, scratch)
        if offset % PAGE_BYTES or size_bytes < LEAST_VIDEO_BYTES:
            raise ParameterError(
                f"video: offset is a multiple of 4096, size_bytes at least {LEAST_VIDEO_BYTES}"
            )
        video.check(offset, size_bytes)
        self._buffer_at = offset
        self._replayable = replayable
        self.faults = FaultBuffer(video, offset)
        self._pool = TablePool(video, offset + BUFFER_BYTES, size_bytes - BUFFER_BYTES)
        self.spaces: dict[int, PageTables] = {0: PageTables(self._pool)}
        self._next_space = 1
        self.links = 0

    def open(self) -> None:
        """See :meth:`Engine.open`."""
        super().open()
        self.links = self._read(hw.GPU_LINKS)

    def _set_up(self) -> None:
        """Also the MMU and the fault buffer; page tables stay as they are, the links too."""
        super()._set_up()
        self._write_pair(hw.GPU_MMU_ROOT_LOW, self.spaces[0].root)
        replayable = hw.MMU_CONTROL_REPLAYABLE if self._replayable else 0
        self._write(hw.GPU_MMU_CONTROL, hw.MMU_CONTROL_ENABLE | replayable)
        self._set_up_faults(self._buffer_at)

    # --- address spaces

    def space(self, number: int) -> PageTables:
        """:raises ParameterError: there is no such space."""
        if number not in self.spaces:
            raise ParameterError(f"space: there is no {number}")
        return self.spaces[number]

    def add_space(self) -> int:
        """Make an address space; returns its number. :raises OSError: ENOMEM."""
        self.spaces[self._next_space] = PageTables(self._pool)
        self._next_space += 1
        return self._next_space - 1

    def drop_space(self, number: int) -> None:
        """Forget one that no link exports any more; not space 0."""
        if number == 0:
            raise ParameterError("space: 0 is the GPU's own")
        self.space(number).close()
        del self.spaces[number]

    def invalidate(self, virtual: int | None) -> None:
        """Have the device forget the translation of a page of space 0, or (None) all of them."""
        if virtual is None:
            self._write(hw.GPU_INVALIDATE, 2)
            self._pool.invalidated()
        else:
            self._write_pair(hw.GPU_INVALIDATE_LOW, virtual)
            self._write(hw.GPU_INVALIDATE, 1)

    def serve(
        self, number: int, windows: list[dict[str, Any]], timeout_s: float, by: str
    ) -> dict[str, Any]:
        """Answer the page faults of a batch until it ends: each page that a window has is mapped
        when it is first touched; a fault elsewhere, or a write to a window that is not writable, is
        cancelled. Answers as :meth:`wait`, with ``served`` and ``cancelled``.

        :param windows: arguments of :meth:`PageTables.map`, for all of the window.
        """
        check_way(by)
        if by == "interrupt":
            self.arm()
        watch = Stopwatch(timeout_s)
        served = cancelled = 0
        vectors = (FAULT_VECTOR, ERROR_VECTOR, COMMAND_VECTOR)
        while True:
            self._until(
                lambda: self.faults.has_record() or self._reached() >= number, vectors, watch, by
            )
            records = self.faults.take_all()
            if not records:
                break
            self._write(hw.FAULT_GET, self.faults.next)
            bad = [record for record in records if not self._serve_one(record, windows)]
            cancelled += len(bad)
            served += len(records) - len(bad)
            self.replay(cancel=bool(bad))
        answer = self.wait(number, watch.left_s(), by)
        return {**answer, "served": served, "cancelled": cancelled}

    def _serve_one(self, record: dict[str, Any], windows: list[dict[str, Any]]) -> bool:
        """Map the page of a fault; False if no window has it."""
        for window in windows:
            page = window["page_bytes"]
            within = (record["address"] - window["virtual"]) & -page
            if 0 <= within < window["size_bytes"] and (window["writable"] or not record["write"]):
                one = {
                    **window,
                    "virtual": window["virtual"] + within,
                    "size_bytes": page,
                    "address": window["address"] + within,
                    "replace": True,
                }
                self.spaces[0].map(**one)
                return True
        return False

    def first_touches(
        self,
        *,
        virtual: int,
        count: int,
        page_bytes: int,
        address: int,
        backing_bytes: int,
        aperture: int,
        access: str,
        by: str,
        timeout_s: float,
    ) -> dict[str, list[int]]:
        """Touch ``count`` pages that are not there, one after the other, and answer each fault by
        mapping it: see :meth:`Batches.touch_all`.

        :param address: what the pages are mapped to, page after page, and from its start again
            after ``backing_bytes``.
        :raises OSError: EEXIST: something is mapped there already; others as ``touch``.
        """
        check_way(by)
        tables = self.spaces[0]

        def service(fault: int) -> None:
            page = (fault - virtual) // page_bytes
            tables.map(
                virtual + page * page_bytes,
                page_bytes,
                address + page * page_bytes % backing_bytes,
                aperture,
                page_bytes=page_bytes,
            )

        places = range(virtual, virtual + count * page_bytes, page_bytes)
        for place in places:
            if tables.find(place):
                raise OSError(errno.EEXIST, f"something is mapped at {place:#x}")
        try:
            touching = (self._touching(place, access) for place in places)
            return self.touch_all(touching, service, timeout_s, by)
        finally:
            tables.unmap(virtual, count * page_bytes)
            self.invalidate(None)

    def _touching(self, virtual: int, access: str) -> bytes:
        """A command that reads or writes 8 bytes there."""
        write = access == "write"
        return struct.pack(
            hw.COMMAND_FORM,
            hw.OPCODE_SIGNAL if write else hw.OPCODE_COPY, 0,
            0 if write else hw.APERTURE_VIRTUAL,
            hw.APERTURE_VIRTUAL if write else hw.APERTURE_SYSTEM,
            0, 0, 0,
            0 if write else virtual, virtual if write else self.dump_iova, 8,
            0, 0, 0, 0, virtual, 0,
        )  # fmt: skip

    # --- links

    def link(self, number: int) -> dict[str, Any]:
        """``{link, state, enabled, width, peer_size_bytes, export, synchronizing}``."""
        base = self._link(number)
        mode = self._read(base + hw.LINK_EXPORT_MODE)
        return {
            "link": number,
            "state": self._link_state(number),
            "enabled": bool(self._read(base + hw.LINK_CONTROL)),
            "width": self._read(base + hw.LINK_WIDTH),
            "peer_size_bytes": self._read_pair(base + hw.LINK_PEER_SIZE_LOW),
            "export": next(name for name, value in MODES.items() if value == mode),
            "synchronizing": bool(self._read(base + hw.LINK_SYNC)),
        }

    def enable_link(self, number: int, *, on: bool) -> None:
        """Take this end of the link up or down."""
        self._write(self._link(number) + hw.LINK_CONTROL, int(on))

    def export(self, number: int, mode: str, start: int, size_bytes: int, timeout_s: float) -> bool:
        """Choose what the peer may reach, and wait until it holds; False if the peer does not say
        so in time.

        :param start: ``physical``: offset in video memory; ``virtual``: the number of the space.
        """
        if mode not in MODES:
            raise ParameterError(f"mode: {mode!r} is none of {', '.join(MODES)}")
        base = self._link(number)
        self._write(base + hw.LINK_EXPORT_MODE, MODES[mode])
        place = self.space(start).root if mode == "virtual" else start
        self._write_pair(base + hw.LINK_EXPORT_BASE_LOW, place)
        self._write_pair(base + hw.LINK_EXPORT_SIZE_LOW, size_bytes)
        self._write(base + hw.LINK_SYNC, 1)
        watch = Stopwatch(timeout_s)
        while self._read(base + hw.LINK_SYNC):
            self._status()
            if watch.expired():
                return False
        return True

    def wait_link(self, number: int, state: str, timeout_s: float, by: str) -> bool:
        """Wait until the link is ``up`` or ``down``; False when the time is over first."""
        check_way(by)
        if state not in _STATES.values():
            raise ParameterError(f"state: {state!r} is neither up nor down")
        self._link(number)
        if by == "interrupt":
            self.arm()
        watch = Stopwatch(timeout_s)
        while self._link_state(number) != state:
            if watch.expired():
                return False
            self._status()  # a lost device would say nothing for ever
            if by == "interrupt":
                self.device.wait_any((LINK_VECTOR,), min(SLICE_S, watch.left_s()))
        return True

    def _link(self, number: int) -> int:
        if number >= self.links:
            raise ParameterError(f"link: {self.device.bdf} has {self.links}, counted from 0")
        return hw.LINK_BASE + number * hw.LINK_STRIDE

    def _link_state(self, number: int) -> str:
        return _STATES.get(self._read(self._link(number) + hw.LINK_STATE), "absent")
