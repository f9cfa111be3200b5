# SPDX-License-Identifier: Apache-2.0
"""The kernel's own decisions about peer-to-peer DMA, through the module ``p2p_probe``.

Its source, ``guest_agent/kmod/p2p_probe``, says what each command means to the kernel.
"""

from __future__ import annotations

import errno

from guest_agent.hw.binding import Bindings
from guest_agent.p2p.command_file import ask_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MODULE = "p2p_probe"


class Probe:
    """Asks the module, and holds the functions that it made providers."""

    def __init__(self) -> None:
        self._providers = Bindings()

    def provide(self, bdf: str, bar: int, size_bytes: int, offset: int) -> int:
        """Make a part of a BAR peer-to-peer memory; a size of 0 is the rest of it.

        The function is taken from its driver until :meth:`release`. Raises OSError: EBUSY while
        VFIO owns it or its group; EINVAL: no such BAR, or not aligned as the kernel wants it.
        :returns: the bus address of its start.
        """
        fresh = self._providers.take(bdf, MODULE)
        try:
            return int(_ask(f"provide {bdf} {bar} {size_bytes} {offset}")[0]["start"])
        except OSError:
            if fresh:
                self.release(bdf)
            raise

    def release(self, bdf: str) -> None:
        """Give a provider back to the driver that it had. Raises OSError(ENOENT): it is none."""
        if not self._providers.give_back(bdf):
            raise OSError(errno.ENOENT, f"{bdf} was not made a provider")

    def close(self) -> None:
        """Give all providers back."""
        self._providers.close()

    def distance(self, provider: str, clients: list[str]) -> dict[str, int | None]:
        """``pci_p2pdma_distance_many()`` for each client, and for ``all``; None: no path."""
        return {
            each["client"]: None if each["distance"] == "none" else each["distance"]
            for each in _ask(f"distance {provider} {' '.join(clients)}")
        }

    def publish(self, provider: str, publish: bool) -> None:
        """Offer a provider's memory to :meth:`find`, as its driver may have done, or no longer."""
        _ask(f"publish {provider} {publish:d}")

    def find(self, clients: list[str]) -> str | None:
        """The published provider that ``pci_p2pmem_find_many()`` takes for all of the clients.

        Of several that are as near, the kernel takes any. None: no provider serves them all.
        """
        provider: str = _ask(f"find {' '.join(clients)}")[0]["provider"]
        return None if provider == "none" else provider

    def map_type(self, provider: str, client: str, size_bytes: int) -> dict[str, Any]:
        """What ``dma_map_sgtable()`` makes of a piece of the provider's memory for the client.

        ``type`` is ``bus`` (an address that no IOMMU translates), ``iova``, ``physical`` (there is
        no IOMMU, or it passes through) or ``refused``, then with the kernel's ``errno``. Raises
        OSError: ENXIO: the provider has no free peer-to-peer memory; EBUSY: VFIO owns the client.
        """
        return self.map_types(provider, [client], size_bytes)[client]

    def map_types(
        self, provider: str, clients: list[str], size_bytes: int
    ) -> dict[str, dict[str, Any]]:
        """:meth:`map_type` for each of the clients, by their names."""
        found = {}
        for client in clients:
            answer = _ask(f"map {provider} {client} {size_bytes}")[0]
            found[client] = {
                "type": answer["type"],
                "errno": answer["error"] or None,
                "address": answer["address"],
                "physical": answer["physical"],
            }
        return found


def _ask(words: str) -> list[dict[str, Any]]:
    return ask_all(MODULE, words)
