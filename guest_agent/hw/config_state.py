# SPDX-License-Identifier: Apache-2.0
"""What a function's configuration space loses in a reset: kept, given back, and compared.

As the kernel does around a suspend (drivers/pci/pci.c, ``pci_save_state``), for functions that no
driver uses: interrupts are off then, and so they stay. Offsets: include/uapi/linux/pci_regs.h.
"""

from __future__ import annotations

import os

from guest_agent.observe.pci import ConfigSpace, capabilities, extended_capabilities

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PCI = "/sys/bus/pci/devices"
COMMAND = (0x04, 2)
_STATUS = slice(0x06, 0x08)  # tells what happened, and is no setting
_HEADER_BYTES = 0x30  # up to and with the subsystem; all that the kernel knows a function by
_BASE = (
    (0x0C, 2),  # cache line, latency timer
    *((0x10 + 4 * index, 4) for index in range(6)),  # base addresses
    (0x30, 4),  # of the ROM
    (0x3C, 1),  # interrupt line
)
_CAPABILITIES = {
    0x01: ((4, 2),),  # power management
    0x10: ((0x08, 2), (0x10, 2), (0x28, 2), (0x30, 2)),  # PCI Express: device and link
}
_EXTENDED = {
    0x01: ((0x08, 4), (0x0C, 4), (0x14, 4), (0x18, 4)),  # AER: masks, severity, control
    0x0D: ((6, 2),),  # ACS
    0x0E: ((6, 2),),  # ARI
    0x0F: ((6, 2),),  # ATS
    0x10: ((0x10, 2), (0x20, 4), *((0x24 + 4 * index, 4) for index in range(6))),  # SR-IOV
    0x13: ((4, 2), (0x0C, 4)),  # PRI
    0x18: ((4, 2), (6, 2)),  # LTR
    0x1B: ((6, 2),),  # PASID
    0x1E: ((8, 4), (0x0C, 4)),  # L1 substates
    0x1F: ((8, 4),),  # PTM
}


class Kept:
    """One function's settings, as they were when this was made; its file stays open.

    :param function: its address, ``0000:02:00.0``.
    :raises OSError: there is no such function.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        path = f"{PCI}/{function}/config"
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        with ConfigSpace(path) as config:
            self.registers = [
                (offset, config.bytes_at(offset, size)) for offset, size in _registers(config)
            ]
        self._header = self._read()

    def give_back(self) -> str:
        """Write what was kept; what is not so then, or "" if all is.

        :raises OSError: the function is gone.
        """
        write, fd = os.pwrite, self._fd
        for offset, value in self.registers:
            write(fd, value, offset)
        found = self._read()
        return "" if found == self._header else _difference(self.function, self._header, found)

    def close(self) -> None:
        """It is not wanted any more."""
        os.close(self._fd)

    def _read(self) -> bytes:
        header = bytearray(os.pread(self._fd, _HEADER_BYTES, 0))
        header[_STATUS] = b"\0\0"
        return bytes(header)


def _registers(config: ConfigSpace) -> Iterator[tuple[int, int]]:
    """(offset, size in bytes) of each setting; last the one that lets the others take effect."""
    yield from _BASE
    for table, found in (
        (_CAPABILITIES, capabilities(config)),
        (_EXTENDED, extended_capabilities(config)),
    ):
        for identifier, start in found:
            yield from ((start + offset, size) for offset, size in table.get(identifier, ()))
    yield COMMAND


def _difference(function: str, wanted: bytes, found: bytes) -> str:
    if found[:4] == b"\xff\xff\xff\xff":
        return f"{function} is not there"
    offset = next(n for n in range(0, len(wanted), 4) if wanted[n : n + 4] != found[n : n + 4])
    now, before = (int.from_bytes(each[offset : offset + 4], "little") for each in (found, wanted))
    return f"{function}: its register 0x{offset:02x} is 0x{now:08x}, and was 0x{before:08x}"
