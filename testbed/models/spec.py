# SPDX-License-Identifier: Apache-2.0
"""What the models of one rack node are, from JSON to values; nothing is opened here.

::

    {"control": "models.sock", "ready": "models.ready",
     "machine": {"monitor": "qmp-models.sock", "log": "log/qemu.log"},
     "memories": [{"name": "gpu0.vram", "fd": 100, "function": "gpu0-vram", "bar": 2},
                  {"name": "gpu1.vram", "path": "/proc/7/fd/101"}],
     "devices": [{"name": "gpu0", "kind": "gpu", "socket": "gpu0.vfu", "memory": "gpu0.vram",
                  "function": "gpu0-engine",
                  "links": [{"peer": "host0/gpu1", "socket": "link0.sock", "listens": true}]},
                 {"name": "nic0", "kind": "nic", "socket": "nic0.vfu", "address": 1,
                  "wire": "nic0.wire", "peers": {"2": "../node1/nic0.wire"}},
                 {"name": "card0", "kind": "cards/mine.py:Card", "socket": "card0.vfu"}]}

``memories`` are the rack's memory files: a descriptor that the process inherits, or a path under
/proc. A device of kind ``gpu`` names the one that is its video memory; all are known by name to the
trace and to routes. ``machine`` (optional) is where its QEMU tells its PCI tree: without it nothing
is routed below the IOMMU. ``function`` is QEMU's identifier of a device, or of the one whose BAR a
memory is. ``ready`` (optional) is a file that is made when every socket is there. Paths
are relative to the process's working directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from testbed.errors import InputError
from testbed.models.inject import Rule
from testbed.models.link import LinkEnd
from testbed.models.pacing import UNTIMED, BusTiming, Timing

MAX_SOCKET_PATH: Final = 107  # sun_path without its NUL
MAX_DEVICES: Final = 512
MAX_ADDRESS: Final = 0xFFFF
BUILT_IN: Final = ("gpu", "nic")
Value = TypeVar("Value")


class MachineSpec(NamedTuple):
    """The QEMU that the models are plugged into: a QMP socket of ours, and the log it writes."""

    monitor: Path
    log: Path


class MemorySpec(NamedTuple):
    """One memory file: ``fd`` (an inherited one) or ``path``; and the BAR that shows it, if any."""

    name: str
    fd: int = -1
    path: Path | None = None
    function: str = ""
    bar: int = 0


@dataclass(frozen=True)
class DeviceSpec:
    """One device. ``kind`` is one of the built-in kinds or ``FILE.py:CLASS``.

    ``address``, ``wire`` and ``peers`` are a NIC's: its number on the rack's network, its socket
    there, and the sockets of others by their numbers.
    ``msi``: a gpu or nic interrupts by MSI instead of MSI-X, and QEMU 11.1 can unplug it.
    ``faults`` are armed before the first command; ``bus_timing`` is what its ways on PCIe carry.
    ``options`` are handed to a device of one's own as keywords; with ``sha256`` its file must be
    the one of that digest.
    """

    name: str
    kind: str
    socket: Path
    function: str = ""
    memory: str = ""
    links: tuple[LinkEnd, ...] = ()
    address: int = 0
    wire: Path | None = None
    peers: Mapping[int, Path] = field(default_factory=dict)
    msi: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    sha256: str = ""
    faults: tuple[Rule, ...] = ()
    bus_timing: BusTiming = UNTIMED

    @property
    def is_own(self) -> bool:
        """Whether its code is the user's and not the testbed's."""
        return self.kind not in BUILT_IN


class ServeSpec(NamedTuple):
    """All of it."""

    control: Path
    memories: tuple[MemorySpec, ...]
    devices: tuple[DeviceSpec, ...]
    ready: Path | None = None
    machine: MachineSpec | None = None


class _Reader:
    """One JSON object, whose entries are taken one by one; what is left over is an error."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise InputError(f"{where}: expected an object")
        self._left: dict[Any, Any] = dict(data)
        self.where = where

    def take(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        value = self._left.pop(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise InputError(f"{self.where}: '{key}' is missing or no {kind.__name__}")
        return value

    def path(self, key: str) -> Path:
        return self.checked(key, self.take(key, str))

    def checked(self, key: str, text: object) -> Path:
        if (
            not isinstance(text, str)
            or not text
            or len(text.encode()) > MAX_SOCKET_PATH
            or "\0" in text
        ):
            raise InputError(
                f"{self.where}: '{key}' is empty or longer than {MAX_SOCKET_PATH} bytes"
            )
        return Path(text)

    def end(self) -> None:
        if self._left:
            raise InputError(f"{self.where}: unknown entry '{min(map(str, self._left))}'")


def parse(data: object) -> ServeSpec:
    """The specification in parsed JSON. InputError says where it is wrong."""
    reader = _Reader(data, "specification")
    control = reader.path("control")
    ready = reader.take("ready", str, "")
    memories = tuple(
        _memory(item, f"memories[{number}]")
        for number, item in enumerate(reader.take("memories", list, []))
    )
    devices = tuple(
        _device(item, f"devices[{number}]")
        for number, item in enumerate(reader.take("devices", list))
    )
    machine = reader.take("machine", dict, {})
    reader.end()
    for what, names in (
        ("memory", [memory.name for memory in memories]),
        ("device", [device.name for device in devices]),
        ("socket", [str(device.socket) for device in devices]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"two of one name: {what} '{twice[0]}'")
    if len(devices) > MAX_DEVICES:
        raise InputError(f"more than {MAX_DEVICES} devices")
    known = {memory.name for memory in memories}
    for device in devices:
        if device.memory and device.memory not in known:
            raise InputError(f"device '{device.name}': no memory '{device.memory}'")
    return ServeSpec(control, memories, devices, Path(ready) if ready else None, _machine(machine))


def _machine(data: Mapping[str, object]) -> MachineSpec | None:
    if not data:
        return None
    reader = _Reader(data, "machine")
    machine = MachineSpec(reader.path("monitor"), Path(reader.take("log", str)))
    reader.end()
    return machine


def _memory(data: object, where: str) -> MemorySpec:
    reader = _Reader(data, where)
    name = reader.take("name", str)
    fd = reader.take("fd", int, -1)
    path = reader.take("path", str, "")
    function = reader.take("function", str, "")
    bar = reader.take("bar", int, 0)
    reader.end()
    if (fd < 0) == (not path):
        raise InputError(f"{where}: either 'fd' or 'path'")
    return MemorySpec(name, fd, Path(path) if path else None, function, bar)


def _device(data: object, where: str) -> DeviceSpec:
    reader = _Reader(data, where)
    wire = reader.take("wire", str, "")
    device = DeviceSpec(
        name=reader.take("name", str),
        kind=reader.take("kind", str),
        socket=reader.path("socket"),
        function=reader.take("function", str, ""),
        memory=reader.take("memory", str, ""),
        links=tuple(
            _link(item, f"{where}.links[{number}]")
            for number, item in enumerate(reader.take("links", list, []))
        ),
        address=reader.take("address", int, 0),
        wire=reader.checked("wire", wire) if wire else None,
        peers=_peers(reader),
        msi=reader.take("msi", bool, False),
        options=reader.take("options", dict, {}),
        sha256=reader.take("sha256", str, ""),
        faults=tuple(Rule.parse(item) for item in reader.take("faults", list, [])),
        bus_timing=_bus_timing(reader.take("bus_timing", dict, {}), f"{where}.bus_timing"),
    )
    reader.end()
    if not 0 <= device.address <= MAX_ADDRESS:
        raise InputError(f"{where}: 'address' is above {MAX_ADDRESS} or negative")
    return device


def _peers(reader: _Reader) -> dict[int, Path]:
    peers = {}
    for number, path in reader.take("peers", dict, {}).items():
        if not str(number).isdecimal() or int(number) > MAX_ADDRESS:
            raise InputError(f"{reader.where}: 'peers' are by number, up to {MAX_ADDRESS}")
        peers[int(number)] = reader.checked("peers", path)
    return peers


def _bus_timing(data: dict[str, Any], where: str) -> BusTiming:
    reader = _Reader(data, where)
    timing = BusTiming(
        _timing(reader.take("memory", dict, {}), f"{where}.memory"),
        **{
            side: {
                name: _timing(item, f"{where}.{side}.{name}")
                for name, item in reader.take(side, dict, {}).items()
            }
            for side in ("up", "across")
        },
    )
    reader.end()
    return timing


def _timing(data: object, where: str) -> Timing:
    reader = _Reader(data, where)
    timing = _take_timing(reader)
    reader.end()
    return timing


def _take_timing(reader: _Reader) -> Timing:
    rate = reader.take("bytes_per_s", float, 0.0)
    return Timing(rate, reader.take("latency_s", float, 0.0))


def _link(data: object, where: str) -> LinkEnd:
    reader = _Reader(data, where)
    end = LinkEnd(
        socket=reader.path("socket"),
        listens=reader.take("listens", bool),
        peer=reader.take("peer", str),
        width=reader.take("width", int, 16),
        timing=_take_timing(reader),
    )
    reader.end()
    return end
