# SPDX-License-Identifier: Apache-2.0
"""One PCI function in the agent's hands: what :mod:`vfio` and :mod:`raw` both offer."""

from __future__ import annotations

import errno

from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest_agent.hw.region import Region

_COMMAND = 0x04
_COMMAND_MEMORY = 0x2
_COMMAND_MASTER = 0x4


class Device:
    """A function whose registers can be mapped and whose configuration space can be accessed.

    Regions 0 to 5 are its base address registers; each is mapped when first asked for and stays
    mapped until :meth:`close`. ``was_reset``: the function was reset, and nobody asked for a region
    of it since then.
    """

    was_reset = False

    def __init__(self, bdf: str) -> None:
        self.bdf = bdf
        self._regions: dict[int, Region] = {}

    def describe(self) -> dict[str, Any]:
        """``{regions: [{index, size_bytes, flags, offset}], irqs: [{index, count, flags}]}``."""
        raise NotImplementedError

    def config_read(self, offset: int, size_bytes: int) -> int:
        """A little-endian word of the configuration space."""
        raise NotImplementedError

    def config_write(self, offset: int, size_bytes: int, value: int) -> None:
        """Store a little-endian word in the configuration space."""
        raise NotImplementedError

    def reset(self) -> bool:
        """Reset the function alone; False where it has no such reset. Interrupts stay armed."""
        raise NotImplementedError

    def arm(self, kind: str, vector: int) -> None:
        """Count interrupts of this vector. :raises OSError: ENOTSUP where it is impossible."""
        raise OSError(errno.ENOTSUP, f"{self.bdf}: {kind} {vector}: only VFIO delivers interrupts")

    def wait(self, vector: int, timeout_s: float) -> int:
        """How often the armed vector fired since the last call; 0 after ``timeout_s``."""
        raise ParameterError(f"vector: {vector} of {self.bdf} is not armed ({timeout_s} s)")

    def wait_any(self, vectors: tuple[int, ...], timeout_s: float) -> list[int]:
        """Which of these armed vectors fired since they were last asked for; [] after
        ``timeout_s``.
        """
        raise ParameterError(f"vector: {vectors} of {self.bdf} are not armed ({timeout_s} s)")

    def is_armed(self) -> bool:
        """Whether any interrupt is armed."""
        return False

    def region(self, index: int) -> Region:
        """The mapped region. :raises ParameterError: it has none of that number."""
        self.was_reset = False
        if index not in self._regions:
            self._regions[index] = self._map(index)
        return self._regions[index]

    def _map(self, index: int) -> Region:
        raise NotImplementedError

    def enable(self) -> None:
        """Let the function answer memory accesses and make its own."""
        command = self.config_read(_COMMAND, 2)
        self.config_write(_COMMAND, 2, command | _COMMAND_MEMORY | _COMMAND_MASTER)

    def decode(self, on: bool) -> None:
        """Turn memory decoding on or off."""
        command = self.config_read(_COMMAND, 2) & ~_COMMAND_MEMORY
        self.config_write(_COMMAND, 2, command | _COMMAND_MEMORY * on)

    def identity(self) -> tuple[int, int]:
        """Vendor and device identifier."""
        return self.config_read(0, 2), self.config_read(2, 2)

    def close(self) -> None:
        """Unmap everything. Idempotent."""
        for region in self._regions.values():
            region.close()
        self._regions.clear()
