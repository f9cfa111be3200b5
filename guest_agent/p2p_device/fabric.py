# SPDX-License-Identifier: Apache-2.0
"""GPU models on a scale-up fabric: who has joined, what is exported to whom, and how it translates.

What the core's ``IovaBackend`` and ``FabricBackend`` ask of devices, on links and on VFIO.
"""

from __future__ import annotations

import contextlib
import errno

from guest_agent.hw import model_registers as hw
from guest_agent.p2p.addresses import DmaAddress, FabricAddress, on_fabric
from guest_agent.p2p.clock import MonotonicClock
from guest_agent.p2p.events import Recorder
from guest_agent.p2p.resv import Reservation, locked
from guest_agent.p2p.rules import Task
from guest_agent.p2p_device.ranges import PAGE_BYTES, Ranges
from guest_agent.rpc import ParameterError, check_parts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from guest_agent.agent import Agent
    from guest_agent.hw.gpu import Gpu
    from guest_agent.hw.region import Region
    from guest_agent.hw.vfio import VfioContainer
    from guest_agent.p2p import ual
    from guest_agent.p2p.addresses import Address
    from guest_agent.p2p_device.room import HostForwarder

# A fabric physical address: whose memory, and which byte of it. In a page table entry the bit above
# says that it is one; the model's driver makes a link's aperture of the two.
IDENTITY_SHIFT = 40
ROUTE_BIT = 51
# Far above any offset in video memory and any IOVA in use, so that none is taken for another.
VIRTUAL_START = 3 << 42
VIRTUAL_BYTES = 1 << 36
SYNC_TIMEOUT_S = 5.0
CONTEXTS = ("reclaim", "notifier lock", "reservation")
_ADDRESS = {"kind": "str", "value": "int", "user": "str"}
_ADDRESS_MAY = {"fabric": "str", "physical": "bool"}


class Spaces:
    """The translations of one initiator: page tables in the owner's memory. An ``IovaBackend``."""

    granule_bytes = PAGE_BYTES
    translates = True
    untrusted = False

    def __init__(self, gpu: Gpu, link: int) -> None:
        self._gpu = gpu
        self._link = link
        self._addresses = Ranges(VIRTUAL_START, VIRTUAL_BYTES, guard_bytes=PAGE_BYTES, rotate=True)
        self.space = gpu.add_space()

    @property
    def allocated(self) -> int:
        """How many ranges are."""
        return len(self._addresses)

    def reserve(self, size_bytes: int, limit: int) -> int | None:
        """See ``IovaBackend``."""
        if limit < VIRTUAL_START + VIRTUAL_BYTES - 1:
            return None
        return self._addresses.take(size_bytes)

    def release(self, iova: int, size_bytes: int) -> None:
        """See ``IovaBackend``."""
        del size_bytes  # it knows
        self._addresses.give_back(iova)

    def map(self, iova: int, physical: int, size_bytes: int, *, writable: bool) -> None:
        """See ``IovaBackend``: the initiator looks at the tables with its next access."""
        tables = self._gpu.space(self.space)
        tables.map(iova, size_bytes, physical, hw.APERTURE_VRAM, writable=writable)

    def unmap(self, iova: int, size_bytes: int) -> int:
        """See ``IovaBackend``: the initiator has forgotten them when this returns."""
        done = self._gpu.space(self.space).unmap(iova, size_bytes)
        self.export()
        return done

    def export(self) -> None:
        """Let the initiator see what is linked, and have it forget the rest."""
        end = VIRTUAL_START + VIRTUAL_BYTES
        _export(self._gpu, self._link, "virtual", self.space, end)


class Peering:
    """One owner's memory for one initiator. A ``FabricBackend``."""

    def __init__(self, port: Port, peer: str, link: int) -> None:
        self.name = port.fabric
        self.link = link
        self._port = port
        self._peer = peer
        self._spaces: Spaces | None = None
        self.mode = "closed"
        self.states: set[int] = set()

    @property
    def title(self) -> str:
        """Whose memory for whom."""
        return f"{self._port.device} for {self._peer}"

    @property
    def spaces(self) -> Spaces:
        """See ``FabricBackend``; made when first wanted."""
        if self._spaces is None:
            self._spaces = Spaces(self._port.gpu, self.link)
        return self._spaces

    @property
    def allocated(self) -> int:
        """How many ranges of translated addresses are; no space is made to find out."""
        return self._spaces.allocated if self._spaces is not None else 0

    def physical_address(self, owner: str, physical: int) -> int:
        """See ``FabricBackend``."""
        if owner != self._port.device or not 0 <= physical < self._port.video_bytes:
            raise OSError(errno.ENXIO, f"{owner} has nothing at {physical:#x} on {self.name}")
        return self._port.identity << IDENTITY_SHIFT | physical

    def use(self, mode: str) -> None:
        """Export in that mode from now on. :raises OSError: EBUSY: another is in use."""
        if mode != self.mode and self.states:
            raise OSError(errno.EBUSY, f"{self._peer} has addresses of mode {self.mode}")
        if mode == "virtual":
            self.spaces.export()
        else:
            size = self._port.video_bytes if mode == "physical" else 0
            _export(self._port.gpu, self.link, mode, 0, size)
        self.mode = mode


class Port:
    """A GPU on a fabric.

    :param identity: which device it is in a fabric physical address.
    :param video_bytes: how much memory it has there.
    """

    def __init__(self, gpu: Gpu, fabric: str, device: str, identity: int, video_bytes: int) -> None:
        self.gpu = gpu
        self.fabric = fabric
        self.device = device
        self.identity = identity
        self.video_bytes = video_bytes
        self.peers: dict[str, Peering] = {}
        self.links: dict[int, int] = {}  # identity of a peer → link
        self.same_os: set[str] = set()
        self._forwarder: HostForwarder | None = None
        self.given: dict[tuple[str, str], dict[str, Any]] = {}  # answered with an address
        self.latest: dict[tuple[str, str], int] = {}  # the event of a question, or of its answer

    @property
    def forwarder(self) -> HostForwarder:
        """Asks the host what a virtual interconnect leads to; made when first wanted."""
        from guest_agent.p2p_device.room import HostForwarder  # noqa: PLC0415  seldom

        if self._forwarder is None:
            self._forwarder = HostForwarder()
        return self._forwarder

    def forget(self) -> None:
        """Forget what was asked and answered."""
        self._forwarder = None
        self.given.clear()
        self.latest.clear()

    def peer(self, name: str) -> Peering:
        """:raises ParameterError: it is not on the fabric, or no link leads to it."""
        if name not in self.peers:
            known = ", ".join(self.peers)
            raise ParameterError(f"{name!r} is no peer of {self.device} on {self.fabric} ({known})")
        return self.peers[name]


class Vfio:
    """One device's IOMMU address space, and what part of it is given out. An ``IovaBackend``."""

    granule_bytes = PAGE_BYTES
    translates = True
    untrusted = False

    def __init__(self, container: VfioContainer, region: Region, iova: int) -> None:
        self._container = container
        self._region = region
        self._iova = iova

    def reserve(self, size_bytes: int, limit: int) -> int | None:
        """See ``IovaBackend``: the one range that it was given."""
        return self._iova if self._iova + size_bytes - 1 <= limit else None

    def release(self, iova: int, size_bytes: int) -> None:
        """See ``IovaBackend``."""

    def map(self, iova: int, physical: int, size_bytes: int, *, writable: bool) -> None:
        """See ``IovaBackend``; ``physical`` is the offset in the memory."""
        self._container.map(
            self._region, physical, iova, size_bytes, read=True, write=writable, page_bytes=0
        )

    def unmap(self, iova: int, size_bytes: int) -> int:
        """See ``IovaBackend``."""
        return self._container.unmap(iova, size_bytes)


class Given:
    """Addresses that an owner has given out, and the event of that."""

    def __init__(self, state: ual.UalState, peering: Peering, event: int) -> None:
        self.state = state
        self.peering = peering
        self.event = event


class Fabrics:
    """All that the agent has on fabrics, and what happened there."""

    def __init__(self) -> None:
        self.events = Recorder(MonotonicClock())
        self.ports: dict[int, Port] = {}
        self.given: dict[int, Given] = {}
        self._next = 1

    def begin(self) -> None:
        """Somebody else is told what happens from now on."""
        self.events = Recorder(MonotonicClock())

    def add(self, given: Given) -> int:
        """Its number."""
        number = self._next
        self._next += 1
        self.given[number] = given
        given.peering.states.add(number)
        return number

    def drop(self, number: int) -> None:
        """It was given back."""
        self.given.pop(number).peering.states.discard(number)

    def state(self, number: int) -> ual.UalState:
        """:raises ParameterError: there is none of that number."""
        if number not in self.given:
            raise ParameterError(f"state: there is no {number}")
        return self.given[number].state

    @contextlib.contextmanager
    def step(self, number: int, kind: str, what: str = "") -> Iterator[ual.UalState]:
        """A step with what was given out, as an event. Errors as :meth:`state`."""
        state, given = self.state(number), self.given[number]
        with self.events.span(kind, given.peering.title, given.event, what=what):
            yield state

    def close(self) -> None:
        """Nothing of it outlives the GPUs, which the agent gives back."""
        self.ports.clear()
        self.given.clear()


def port_of(agent: Agent, engine: int) -> Port:
    """A GPU on a fabric. :raises ParameterError: it has joined none."""
    port = agent.area(Fabrics).ports.get(engine)
    if port is None or agent.engine(engine) is not port.gpu:
        raise ParameterError(f"engine: {engine} has not joined a fabric (fabric.join)")
    return port


@contextlib.contextmanager
def task_in(context: list[str], name: str) -> Iterator[Task]:
    """A task that is in all of ``context``. :raises ParameterError: none of ``CONTEXTS``."""
    task = Task(name)
    with contextlib.ExitStack() as stack:
        for word in context:
            if word == "reclaim":
                stack.enter_context(task.reclaiming())
            elif word == "notifier lock":
                stack.enter_context(task.notifier_lock())
            elif word == "reservation":
                stack.enter_context(locked(task, Reservation(f"a buffer of {name}")))
            else:
                raise ParameterError(f"context: {word!r} is none of {', '.join(CONTEXTS)}")
        yield task


def address_of(value: dict[str, Any]) -> Address:
    """An address as the host says it. :raises ParameterError: it is none."""
    check_parts("address", value, _ADDRESS, _ADDRESS_MAY)
    if value["kind"] == "dma":
        return DmaAddress(value["value"], value["user"])
    if value["kind"] == "fabric" and {"fabric", "physical"} <= value.keys():
        return FabricAddress(value["value"], value["user"], value["fabric"], value["physical"])
    raise ParameterError("address: of kind 'dma', or 'fabric' with 'fabric' and 'physical'")


def place_of(port: Port, owner: str, address: Address) -> tuple[int, int]:
    """The aperture and the address in it that a page table entry of the model has.

    :raises AddressError: it is not for this port. :raises OSError: ENXIO: no link leads there.
    """
    number = on_fabric(address, port.device, port.fabric)
    if not isinstance(address, FabricAddress) or not address.physical:
        return hw.APERTURE_LINK | port.peer(owner).link << 4, number
    entry = address.page_table_entry(ROUTE_BIT)
    identity = (entry & (1 << ROUTE_BIT) - 1) >> IDENTITY_SHIFT
    if identity not in port.links:
        raise OSError(errno.ENXIO, f"{address}: no link of {port.device} leads to {identity}")
    offset = entry & (1 << IDENTITY_SHIFT) - 1
    return hw.APERTURE_LINK | port.links[identity] << 4, offset


def _export(gpu: Gpu, link: int, mode: str, start: int, size_bytes: int) -> None:
    if not gpu.export(link, mode, start, size_bytes, SYNC_TIMEOUT_S):
        raise OSError(errno.ETIMEDOUT, f"link {link}: the peer takes no note of what is exported")
