# SPDX-License-Identifier: Apache-2.0
"""Intel 82576 (``igb``, QEMU ≥ 8.1) as a copy engine: frames looped back inside the device.

A transmit descriptor's buffer is read, a receive descriptor's buffer is written: one hop from bus
address to bus address. So that any bytes of any number can be copied, each frame carries a header
of its own in front, which the receiver splits off (SRRCTL.DESCTYPE "header split always"): the
driver decides what the device parses, and no payload is ever taken for a malformed packet.

Registers: Intel 82576 Gigabit Ethernet Controller Datasheet, chapters 7 and 8; what QEMU makes of
them: hw/net/igb_core.c. The idea of using it so is tools/testing/selftests/vfio's in the kernel.
"""

from __future__ import annotations

import time
from array import array

from guest_agent.hw.engine import PAGE_BYTES, Engine, Scratch, Stopwatch, check_doorbell
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

    from guest_agent.hw.device import Device
    from guest_agent.hw.region import Region

_CTRL = 0x0000
_CTRL_LINK_UP = 1 << 6
_CTRL_RESET = 1 << 26
_STATUS = 0x0008
_STATUS_LINK_UP = 1 << 1
_MDIC = 0x0020
_MDIC_WRITE = 1 << 26 | 1 << 21  # operation: write; PHY address 1
_MDIC_READY = 1 << 28
_PHY_CONTROL_AUTONEGOTIATE = 1 << 12 | 1 << 9  # enable and restart; PHY register 0
_RCTL = 0x0100
_RCTL_VALUE = (
    1 << 1  # enable
    | 1 << 2  # store bad packets: no limit on the frame's size
    | 1 << 3  # unicast promiscuous
    | 1 << 6  # MAC loopback
    | 1 << 26  # strip the checksum
)
_TCTL = 0x0400
_TCTL_VALUE = 1 << 1 | 1 << 3  # enable, pad short packets
_GPIE = 0x1514
_GPIE_MSIX = 1 << 4
_EIMS = 0x1524
_EIMC = 0x1528
_EIAC = 0x152C
_IVAR0 = 0x1700
_IVAR0_TX = 0x80 << 8  # transmit queue 0 raises vector 0; the receive queue none
_RX = 0xC000
_TX = 0xE000
_BASE_LOW, _BASE_HIGH, _LENGTH, _HEAD, _TAIL, _CONTROL = 0x00, 0x04, 0x08, 0x10, 0x18, 0x28
_SRRCTL = _RX + 0x0C
_SRRCTL_SPLIT_ALWAYS = 5 << 25
_QUEUE_ENABLE = 1 << 25

_TX_FRAGMENT = 3 << 20 | 1 << 29  # advanced data descriptor
_TX_END = 1 << 24 | 1 << 25  # end of packet, insert the checksum
_TX_REPORT = 1 << 27  # write back, and raise the interrupt
_TX_PAYLOAD_SHIFT = 32 + 14  # PAYLEN, in the descriptor's second quadword
_DONE = 1

_DESCRIPTOR_BYTES = 16
_HEADER_BYTES = 64
# Destination and source: locally administered; type: IEEE's for local experiments.
_HEADER = bytes.fromhex("02000000000102000000000288b5").ljust(_HEADER_BYTES, b"\0")
_FRAME_PAGES = 2  # with its header still a jumbo frame (9.5 KiB) to a real 82576
_FRAME_BYTES = _FRAME_PAGES * PAGE_BYTES
_MAX_RING = 4096
_RING_ALIGN = 8  # rings are multiples of 128 bytes
_CELL_BYTES = 256  # header to send, header received, value to write, dump: 64 bytes each
_RECEIVED_AT = 64
_VALUE_AT = 128
_DUMP_AT = 192

# Negotiation takes half a second of QEMU's clock; on a busy host the guest's own runs ahead of it.
_LINK_TIMEOUT_S = 15.0
_STALL_NS = 50_000_000
_POLL_S = 0.0005


class Igb(Engine):
    """One transmit and one receive queue in loopback, set up anew for every batch of frames.

    Scratch memory holds the rings, 8 KiB at least; with 128 KiB a batch is 8 MiB. A target at bus
    address 0 is refused: to the device a null address means "no buffer".
    """

    kind: ClassVar[str] = "igb"
    identity: ClassVar[tuple[int, int]] = (0x8086, 0x10C9)
    max_copy_bytes: ClassVar[int] = 1 << 32
    can: ClassVar[tuple[str, ...]] = ("copy", "write32", "storm")

    def __init__(self, device: Device, scratch: Scratch | None) -> None:
        super().__init__(device, scratch)
        if scratch is None or scratch.size_bytes < 2 * PAGE_BYTES:
            raise ParameterError("scratch: igb needs at least 8192 bytes for its rings")
        self._registers: Region = device.region(0)
        # A frame takes one receive descriptor and, of the transmit ring, one for its header and
        # one for each page it touches.
        room = (scratch.size_bytes - _CELL_BYTES) // _DESCRIPTOR_BYTES
        self._tx_count = min(_MAX_RING, room * 3 // 4 // _RING_ALIGN * _RING_ALIGN)
        self._rx_count = min(_MAX_RING, (room - self._tx_count) // _RING_ALIGN * _RING_ALIGN)
        rx_at = _CELL_BYTES + self._tx_count * _DESCRIPTOR_BYTES
        self._cell_iova = scratch.iova
        self._tx_iova = scratch.iova + _CELL_BYTES
        self._rx_iova = scratch.iova + rx_at
        self._cell = scratch.offset
        self._ring = scratch.region.words64
        self._tx_word = (scratch.offset + _CELL_BYTES) // 8
        self._rx_word = (scratch.offset + rx_at) // 8
        self._memory = scratch.region

    def open(self) -> None:
        """Reset and set up. :raises TimeoutError: the link inside the device does not come up."""
        self._memory.write(self._cell, _HEADER)
        if not self.device.reset():
            self._write(_CTRL, _CTRL_RESET)
        self.device.enable()
        self._write(_CTRL, self._read(_CTRL) | _CTRL_LINK_UP)
        self._bring_link_up()
        for ring, iova, count in (
            (_TX, self._tx_iova, self._tx_count),
            (_RX, self._rx_iova, self._rx_count),
        ):
            self._write(ring + _BASE_LOW, iova & 0xFFFFFFFF)
            self._write(ring + _BASE_HIGH, iova >> 32)
            self._write(ring + _LENGTH, count * _DESCRIPTOR_BYTES)
        # QEMU wants room for the header in the packet's buffer too, so 1 KiB more than a payload.
        buffer_kib = (_FRAME_BYTES >> 10) + 1
        self._write(_SRRCTL, _SRRCTL_SPLIT_ALWAYS | _HEADER_BYTES << 2 | buffer_kib)
        self._write(_GPIE, _GPIE_MSIX)
        self._write(_EIAC, 1)
        self._write(_IVAR0, _IVAR0_TX)
        self._write(_EIMS, 1)
        self._write(_RCTL, _RCTL_VALUE)
        self._write(_TCTL, _TCTL_VALUE)

    def copy(
        self, source_iova: int, target_iova: int, size_bytes: int, timeout_s: float
    ) -> dict[str, Any]:
        """See :meth:`Engine.copy`.

        ``copied_bytes`` counts whole batches. When the device drops a frame, those behind it take
        its place: after an incomplete copy the target's range holds anything.
        """
        self.check_copy(size_bytes)
        _check_target(target_iova)
        watch = Stopwatch(timeout_s)
        done = chunks = 0
        completed = True
        while completed and done < size_bytes:
            size, frames, descriptors = self._batch(
                source_iova + done, target_iova + done, size_bytes - done
            )
            completed = self._send(frames, descriptors, watch) == frames
            if completed:
                done += size
                chunks += frames
        return self._answer(watch, completed, done, chunks)

    def write32(self, iova: int, value: int, timeout_s: float) -> dict[str, Any]:
        """See :meth:`Engine.write32`: one frame with a payload of 4 bytes."""
        check_doorbell(iova, value)
        _check_target(iova)
        watch = Stopwatch(timeout_s)
        self._memory.write32(self._cell + _VALUE_AT, value)
        descriptors = self._frame(0, 0, self._cell_iova + _VALUE_AT, iova, 4)
        completed = self._send(1, descriptors, watch) == 1
        return self._answer(watch, completed, 4 * completed, 1 * completed)

    def storm(self, iova: int, count: int, access: str, timeout_s: float) -> dict[str, Any]:
        """See :meth:`Engine.storm`: thousands at once, 64 bytes each."""
        watch = Stopwatch(timeout_s)
        per_batch = min(self._rx_count, self._tx_count // 2) - 1
        started = delivered = 0
        while started < count and not watch.expired():
            frames = min(per_batch, count - started)
            descriptors = 0
            for frame in range(frames):
                fault = iova + (started + frame) * PAGE_BYTES
                source, target = self._cell_iova, self._cell_iova + _DUMP_AT
                if access == "read":
                    source = fault
                else:
                    target = fault
                descriptors = self._frame(descriptors, frame, source, target, 64)
            started += frames
            delivered += self._send(frames, descriptors, watch)
        return self._answer(watch, delivered == count, 64 * delivered, started)

    def close(self) -> None:
        """Stop both directions and all interrupts."""
        for register in (_RCTL, _TCTL, _RX + _CONTROL, _TX + _CONTROL):
            self._write(register, 0)
        self._write(_EIMC, 1)

    def _read(self, register: int) -> int:
        return self._registers.read32(register)

    def _write(self, register: int, value: int) -> None:
        self._registers.write32(register, value)

    def _bring_link_up(self) -> None:
        # Even in loopback the receiver is off without a link; QEMU's comes up with autonegotiation.
        self._write(_MDIC, _MDIC_WRITE | _PHY_CONTROL_AUTONEGOTIATE)
        watch = Stopwatch(_LINK_TIMEOUT_S)
        while not self._read(_STATUS) & _STATUS_LINK_UP:
            if watch.expired():
                raise TimeoutError(f"igb {self.device.bdf}: no link after {_LINK_TIMEOUT_S} s")
            time.sleep(_POLL_S)

    def _batch(self, source: int, target: int, size_bytes: int) -> tuple[int, int, int]:
        """Fill the rings from their starts; (bytes, frames, transmit descriptors) that fitted.

        Frames begin at page boundaries of the source but for the first, and fragments never cross
        one: pages that follow each other in bus addresses need not do so in memory.
        """
        done = frames = descriptors = 0
        while done < size_bytes:
            room = min(
                self._rx_count - 1 - frames,
                (self._tx_count - 1 - descriptors) // (_FRAME_PAGES + 1),
            )
            if room <= 0:
                break
            into_page = (source + done) % PAGE_BYTES
            left = size_bytes - done
            if not into_page and left >= _FRAME_BYTES:
                count = min(room, left // _FRAME_BYTES)
                self._frames(descriptors, frames, source + done, target + done, count)
                size = count * _FRAME_BYTES
                frames += count
                descriptors += count * (_FRAME_PAGES + 1)
            else:
                size = min(left, PAGE_BYTES - into_page) if into_page else left
                descriptors = self._frame(descriptors, frames, source + done, target + done, size)
                frames += 1
            done += size
        return done, frames, descriptors

    def _frame(self, tx: int, rx: int, source: int, target: int, size_bytes: int) -> int:
        """One frame at these places of the rings; the transmit ring's next place."""
        ring, at = self._ring, self._tx_word + 2 * tx
        ring[at] = self._cell_iova
        ring[at + 1] = _header_word(size_bytes)
        done = 0
        while done < size_bytes:
            size = min(size_bytes - done, PAGE_BYTES - (source + done) % PAGE_BYTES)
            at += 2
            ring[at] = source + done
            ring[at + 1] = _TX_FRAGMENT | size
            done += size
        ring[at + 1] |= _TX_END
        received = self._rx_word + 2 * rx
        ring[received] = target
        ring[received + 1] = self._cell_iova + _RECEIVED_AT
        return (at - self._tx_word) // 2 + 1

    def _frames(self, tx: int, rx: int, source: int, target: int, count: int) -> None:
        """``count`` full frames at once, column by column; the source is page-aligned."""
        ring = self._ring
        first = self._tx_word + 2 * tx
        stride = 2 * (_FRAME_PAGES + 1)
        end = first + count * stride
        ring[first:end:stride] = array("Q", [self._cell_iova]) * count
        ring[first + 1 : end : stride] = array("Q", [_header_word(_FRAME_BYTES)]) * count
        stop = source + count * _FRAME_BYTES
        for page in range(_FRAME_PAGES):
            column = first + 2 * (page + 1)
            addresses = range(source + page * PAGE_BYTES, stop, _FRAME_BYTES)
            word = _TX_FRAGMENT | PAGE_BYTES | _TX_END * (page == _FRAME_PAGES - 1)
            ring[column:end:stride] = array("Q", addresses)
            ring[column + 1 : end : stride] = array("Q", [word]) * count
        at = self._rx_word + 2 * rx
        end = at + 2 * count
        ring[at:end:2] = array("Q", range(target, target + count * _FRAME_BYTES, _FRAME_BYTES))
        ring[at + 1 : end : 2] = array("Q", [self._cell_iova + _RECEIVED_AT]) * count

    def _send(self, frames: int, descriptors: int, watch: Stopwatch) -> int:
        """Run what is in the rings; how many frames arrived. Resets the device if some did not."""
        self._ring[self._tx_word + 2 * descriptors - 1] |= _TX_REPORT
        for ring in (_TX, _RX):
            self._write(ring + _CONTROL, 0)
            self._write(ring + _HEAD, 0)
            self._write(ring + _TAIL, 0)
            self._write(ring + _CONTROL, _QUEUE_ENABLE)
        self._write(_RX + _TAIL, frames)
        self._write(_TX + _TAIL, descriptors)
        last = self._rx_word + 2 * frames - 1
        progress = (0, 0)
        moved_ns = 0
        while not self._ring[last] & _DONE:
            seen = (self._read(_TX + _HEAD), self._read(_RX + _HEAD))
            now_ns = watch.elapsed_ns()
            if seen != progress:
                progress, moved_ns = seen, now_ns
            # All was sent and nothing more arrives: the rest is lost, waiting would not help.
            if watch.expired() or (seen[0] == descriptors and now_ns - moved_ns > _STALL_NS):
                self.open()
                return seen[1]
            time.sleep(_POLL_S)
        return frames

    def _answer(
        self, watch: Stopwatch, completed: bool, copied: int, chunks: int
    ) -> dict[str, Any]:
        status = {
            "link": bool(self._read(_STATUS) & _STATUS_LINK_UP),
            "transmit_head": self._read(_TX + _HEAD),
            "receive_head": self._read(_RX + _HEAD),
        }
        return self.answer(watch, completed, copied, chunks, status)


def _header_word(payload_bytes: int) -> int:
    return (_HEADER_BYTES + payload_bytes) << _TX_PAYLOAD_SHIFT | _TX_FRAGMENT | _HEADER_BYTES


def _check_target(iova: int) -> None:
    if iova == 0:
        raise ParameterError("target_iova: igb takes address 0 for no buffer at all")
