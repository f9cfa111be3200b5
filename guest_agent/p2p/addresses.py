# SPDX-License-Identifier: Apache-2.0
"""Addresses whose kind is a type: a dma_addr_t on a fabric port is refused, not reinterpreted.

An address makes sense only together with who uses it: a :class:`DmaAddress` with the requester
whose IOMMU translates it (the 2024 discussion of HMM across devices: "you need to know the device
which does DMA"), a :class:`FabricAddress` with the initiator's port (the 2026-01 discussion of UAL:
dma_addr_t must not come to mean something else). None of them is an integer, so none can be handed
on, compared with or added to another by mistake; ``on_…`` gives the number for one kind of port.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace

from guest_agent.p2p.errors import AddressError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True)
class Address:
    """A number in some address space, for one user. See the subclasses."""

    value: int
    user: str  # the device that may use it

    def plus(self, offset: int) -> Self:
        """The address ``offset`` bytes further."""
        return replace(self, value=self.value + offset)

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.value:#x} of {self.user}"


@dataclass(frozen=True)
class DmaAddress(Address):
    """dma_addr_t: what ``user`` puts on PCIe, as a requester; an IOVA where an IOMMU translates."""


@dataclass(frozen=True)
class LinkAddress(Address):
    """What ``user`` puts on its private link ``port``; counts from 0 of what the peer exports."""

    port: str


@dataclass(frozen=True)
class FabricAddress(Address):
    """What ``user`` puts on the scale-up fabric.

    ``physical``  a cross-device physical address, which goes into the page tables of the initiator
                  with the bit that routes it over the fabric; otherwise an address that the fabric
                  translates for this initiator.
    """

    fabric: str
    physical: bool

    def page_table_entry(self, route_bit: int) -> int:
        """The number for the initiator's page tables, ``1 << route_bit`` set.

        :raises AddressError: ERANGE: the address itself reaches up to that bit.
        """
        if self.value >> route_bit:
            raise AddressError(f"{self} collides with route bit {route_bit}", errno.ERANGE)
        return self.value | 1 << route_bit


def on_pcie(address: Address, requester: str, bits: int = 64) -> int:
    """The number that ``requester`` may put on PCIe.

    :param bits: how wide the requester's DMA addresses are.
    :raises AddressError: EINVAL: of another kind, or of another requester; ERANGE: too wide. It is
        never cut off.
    """
    if not isinstance(address, DmaAddress):
        raise AddressError(f"{address} is no dma_addr_t and cannot be used on PCIe")
    return _checked(address, requester, bits)


def on_link(address: Address, user: str, port: str) -> int:
    """The number that ``user`` may put on its private link ``port``. Errors as :func:`on_pcie`."""
    if not isinstance(address, LinkAddress):
        raise AddressError(f"{address} is no link address and cannot be used on link {port}")
    if address.port != port:
        raise AddressError(f"{address} is for link {address.port}, not {port}")
    return _checked(address, user, 64)


def on_fabric(address: Address, user: str, fabric: str, bits: int = 64) -> int:
    """The number that ``user`` may put on the fabric. Errors as :func:`on_pcie`."""
    if not isinstance(address, FabricAddress):
        raise AddressError(f"{address} is no fabric address and cannot be used on {fabric}")
    if address.fabric != fabric:
        raise AddressError(f"{address} is for {address.fabric}, not {fabric}")
    return _checked(address, user, bits)


def _checked(address: Address, user: str, bits: int) -> int:
    if address.user != user:
        raise AddressError(f"{address} means nothing to {user}")
    if address.value < 0 or address.value >> bits:
        raise AddressError(f"{address} is wider than the {bits} bits of {user}", errno.ERANGE)
    return address.value
