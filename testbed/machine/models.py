# SPDX-License-Identifier: Apache-2.0
"""A node's device models: what to serve, as a command for the keeper, and their control socket.

The models run beside QEMU in a helper process (:mod:`testbed.models.serve`), started before it.
Socket names are relative to the node's runtime folder, as in QEMU's command line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from testbed.errors import DeviceLost, HostError, InputError
from testbed.machine.command import (
    LOG_LINK,
    MODELS_READY,
    MODELS_SOCKET,
    MODELS_SPEC,
    QEMU_LOG,
    QMP_MODELS_SOCKET,
    MemoryFd,
    vfio_socket,
)
from testbed.machine.processes import HelperCommand
from testbed.machine.sockets import ask
from testbed.topology.model import Gpu, Nic, OwnDevice
from testbed.topology.plan import MODEL_KINDS, NodePlan, RackPlan, Role
from testbed.topology.units import NS_PER_S
from testbed.topology.ways import Way, ways_of

ROOT = Path(__file__).resolve().parents[2]
# Isolated and without site-packages, as the built-in models need none: a third of the start.
LAUNCHER = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from testbed.models.{} import main; sys.exit(main(sys.argv[2:]))"
)
READY_TIMEOUT_S = 20.0
VRAM_BAR = 2  # of `ivshmem-plain`
CALL_TIMEOUT_S = 15.0


def has_models(node: NodePlan) -> bool:
    """Whether a device of this node is served from outside QEMU."""
    return any(function.kind in MODEL_KINDS for function in node.functions)


def models_spec(plan: RackPlan, node: NodePlan) -> dict[str, Any]:
    """What :mod:`testbed.models.spec` reads: this node's devices, their memories and links."""
    return {
        "control": MODELS_SOCKET,
        "ready": MODELS_READY,
        "machine": {"monitor": QMP_MODELS_SOCKET, "log": f"{LOG_LINK}/{QEMU_LOG}"},
        "memories": [
            {"name": f.name, "fd": f.memory_fd, "function": f.qemu_id, "bar": VRAM_BAR}
            for f in node.by_role(Role.VRAM)
            if f.memory_fd
        ],
        "devices": list(_devices(plan, node)),
    }


def models_command(plan: RackPlan, node: NodePlan) -> HelperCommand:
    """The helper that serves them; its specification is the file MODELS_SPEC in its folder.

    Devices of the user's own may import what is installed, and need to be trusted: who asks for
    this has seen to it (:mod:`testbed.machine.own_devices`).
    """
    vram = node.by_role(Role.VRAM)
    own = bool(node.by_role(Role.DEVICE))
    launcher = LAUNCHER.format("serve" if own else "lean")
    python = (sys.executable, "-I", *(() if own else ("-S",)), "-c", launcher, str(ROOT))
    return HelperCommand(
        name=f"{node.name}.models",
        node=node.name,
        argv=(*python, *(("--trust",) if own else ()), MODELS_SPEC),
        memory=tuple(MemoryFd(f.memory_fd, f.name, f.vram_size_bytes) for f in vram),
        ready_file=MODELS_READY,
        ready_timeout_s=READY_TIMEOUT_S,
        nursed=() if own else (MODELS_SPEC,),
        makes=(MODELS_SOCKET, MODELS_READY, *_listened_at(_devices(plan, node))),
    )


def _listened_at(devices: Iterator[dict[str, Any]]) -> Iterator[str]:
    for device in devices:
        yield device["socket"]
        if "wire" in device:
            yield device["wire"]
        yield from (link["socket"] for link in device.get("links", ()) if link["listens"])


def _devices(plan: RackPlan, node: NodePlan) -> Iterator[dict[str, Any]]:
    nics = _nics(plan)
    for function in node.functions:
        if function.kind not in MODEL_KINDS:
            continue
        device = {
            "name": function.device,
            "socket": vfio_socket(function.qemu_id),
            "function": function.qemu_id,
            **_on_purpose(plan, node, function.device),
        }
        if function.kind == "model":
            memory = next(f for f in node.of_device(function.device) if f.role is Role.VRAM)
            links = list(_links(plan, node.name, function.device))
            yield {**device, "kind": "gpu", "memory": memory.name, "links": links}
        elif function.kind == "own":
            own = _own(plan, node.name, function.device)
            more = {"options": dict(own.options), "sha256": own.sha256 or ""}
            yield {**device, "kind": own.model, **more}
        elif function.kind == "model-nic":
            address = nics.index((node.name, function.device)) + 1
            yield {
                **device,
                "kind": "nic",
                "address": address,
                "wire": _wire(function.device),
                "peers": {
                    str(number): _beside(node.name, other, _wire(name))
                    for number, (other, name) in enumerate(nics, 1)
                    if number != address
                },
            }


def _own(plan: RackPlan, node: str, device: str) -> OwnDevice:
    entries = plan.topology.nodes[node].entries()
    return next(e for e in entries if isinstance(e, OwnDevice) and e.name == device)


def _on_purpose(plan: RackPlan, node: NodePlan, device: str) -> dict[str, Any]:
    """The faults that a device begins with, and the pace that it keeps on PCIe; nothing if none."""
    spec = plan.topology.nodes[node.name]
    entry = next(e for e in spec.entries() if e.name == device)
    found: dict[str, Any] = {}
    if isinstance(entry, Gpu | Nic | OwnDevice) and entry.faults:
        from testbed.topology.fault_rules import parse_rules, rule_data  # noqa: PLC0415  seldom

        rules = parse_rules(entry.faults, by="topology")
        found["faults"] = [rule_data(rule) for rule in rules]
    ways = ways_of(spec, device)
    if ways.are_timed:
        names = {f.device: f.name for f in node.by_role(Role.VRAM)}
        found["bus_timing"] = {
            "memory": _timing(ways.memory),
            "up": {names[gpu]: _timing(way) for gpu, way in ways.up.items()},
            "across": {names[gpu]: _timing(way) for gpu, way in ways.across.items()},
        }
    return found


def _timing(way: Way) -> dict[str, float]:
    return {"bytes_per_s": way.bytes_per_s, "latency_s": way.latency_ns / NS_PER_S}


def _nics(plan: RackPlan) -> list[tuple[str, str]]:
    """All NIC models of the rack; the first has network address 1."""
    return [
        (node.name, function.device)
        for node in plan.nodes.values()
        for function in node.functions
        if function.kind == "model-nic"
    ]


def _links(plan: RackPlan, node: str, device: str) -> Iterator[dict[str, Any]]:
    """This GPU's ends of links whose both ends are models; the first named end listens."""
    here = f"{node}/{device}"
    for number, link in enumerate(plan.topology.links):
        ends = [_split(end) for end in link.between]
        if here not in link.between or not all(_is_model(plan, *end) for end in ends):
            continue
        listens = link.between[0] == here
        yield {
            "peer": link.between[1 if listens else 0],
            "socket": _beside(node, ends[0][0], f"link{number}.sock"),
            "listens": listens,
            "width": link.width,
            **_timing(Way(link.bandwidth_bytes_per_s or 0, link.latency_ns or 0)),
        }


def _split(end: str) -> tuple[str, str]:
    node, _, device = end.partition("/")
    return node, device


def _is_model(plan: RackPlan, node: str, device: str) -> bool:
    return any(f.kind == "model" for f in plan.nodes[node].of_device(device))


def _wire(device: str) -> str:
    return f"{device}.wire"


def _beside(node: str, other: str, name: str) -> str:
    """A file of ``other``'s folder, as seen from ``node``'s."""
    return name if node == other else f"../{other}/{name}"


class Models:
    """A node's device models, as far as the host may ask: what they saw, what shall go wrong."""

    def __init__(self, node: str, socket: Path) -> None:
        self._node = node
        self._socket = socket

    def call(self, method: str, **params: Any) -> Any:
        """One of :class:`testbed.models.control.Control`'s methods.

        :raises InputError: no such method or device, or a parameter is wrong.
        :raises DeviceLost: that device's model is no more.
        :raises HostError: the models do not answer, or this node has none.
        """
        question = {"id": 1, "method": method, "params": params}
        try:
            answer = ask(self._socket, question, CALL_TIMEOUT_S)
        except (FileNotFoundError, ConnectionRefusedError):
            raise HostError(
                f"node '{self._node}' has no device models",
                hint="`engine: model` in the topology makes a GPU or NIC one",
            ) from None
        except (OSError, ValueError) as error:
            raise HostError(f"the models of node '{self._node}': {error}") from error
        if "error" not in answer:
            return answer["result"]
        return self._refused(answer["error"])

    def _refused(self, error: Mapping[str, str]) -> Any:
        message = f"node '{self._node}': {error['message']}"
        if error["type"] == "DeviceLost":
            raise DeviceLost(message, node=self._node)
        if error["type"] == "InputError":
            raise InputError(message)
        raise HostError(message)
