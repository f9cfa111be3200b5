# SPDX-License-Identifier: Apache-2.0
"""A node's devices on which the agent runs the protocol core: one address space for each device.

:meth:`NegotiationBoard.run` does steps in the guest (:mod:`guest_agent.p2p_device.steps`), judges
nothing; where bytes are is said by steps, and judged here by the guest's and the host's view.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from guest_agent.pattern import pattern
from testbed.errors import CapabilityMissing
from testbed.instruments.bench import Bench
from testbed.instruments.faults import FaultWatch
from testbed.instruments.interface import Rack, RackNode
from testbed.instruments.memory import Memory
from testbed.instruments.model_devices import DRIVER_BYTES, ModelGpu
from testbed.instruments.mutations import Mutation
from testbed.instruments.observer import Refuted
from testbed.instruments.paths import DeviceWitness, PathWatch
from testbed.results.judging import Judgement
from testbed.topology.model import Topology
from testbed.topology.oracle import (
    ingress_port,
    ports_above,
    redirecting_ports,
)
from testbed.topology.plan import Function, NodePlan, RackPlan, Role

EVENTS = "protocol-events.jsonl"
BUFFERS_AT = 1 << 20  # in each video memory
BUFFERS_BYTES = 4 << 20
_IOVA_BYTES = 1 << 30
PREFIX = "nego-"
_CALL_TIMEOUT_S = 120.0  # the first loads the whole core: seconds on an emulated CPU, more if busy

Step = Mapping[str, Any]
Offer = dict[str, Any]


def do(name: str, /, **parts: Any) -> dict[str, Any]:
    """One step."""
    return {"do": name, **parts}


class NegotiationBoard:
    """Everything of one node opened, and a room of the protocol core in its agent."""

    def __init__(self, rack: Rack, node: str, mutation: Mutation) -> None:
        self.node: RackNode = rack.nodes[node]
        plan = self.node.plan
        gpus = [f for f in plan.by_role(Role.ENGINE) if f.kind == "model"]
        nics = [f for f in plan.by_role(Role.ENGINE) if f.kind == "model-nic"]
        self.gpus = [f.device for f in gpus]
        self.nics = [f.device for f in nics]
        self.links, self.link_numbers = links_of(rack.plan, node)
        self._events_file: Path = rack.run_dir / EVENTS
        self._after = 0
        self.vram: dict[str, Memory] = {}
        self.witness: dict[str, DeviceWitness] = {}
        self.requesters = {f.device: f.bdf for f in (*gpus, *nics)}
        self._benches: list[Bench] = []
        members = [self._open(index, f) for index, f in enumerate((*gpus, *nics))]
        self.call(
            "open",
            members=members,
            topology=tables(plan, rack.topology, self.links, [*self.gpus, *self.nics]),
            broken=mutation.removeprefix(PREFIX) if mutation.startswith(PREFIX) else "",
        )
        self.unused: dict[str, int] = self.call("clean")["left"]

    def _open(self, index: int, function: Function) -> dict[str, Any]:
        device = function.device
        bench = Bench.open(self.node, self.node.plan.of_device(device))
        self._benches.append(bench)
        # Each device's addresses begin elsewhere, so that another's lead nowhere.
        bench.mapper.reserve((index + 1) * _IOVA_BYTES)
        member: dict[str, Any] = {
            "name": device,
            "container": bench.container,
            "iova": bench.mapper.reserve(_IOVA_BYTES),
            "iova_bytes": _IOVA_BYTES,
        }
        if device in self.gpus:
            gpu = ModelGpu(bench, device)
            self.vram[device] = gpu.vram
            member["engine"] = gpu.engine.number
            member["vram"] = {
                **gpu.vram.target,
                "offset": BUFFERS_AT,
                "size_bytes": min(BUFFERS_BYTES, gpu.vram.size_bytes - DRIVER_BYTES - BUFFERS_AT),
            }
            member["links"] = {
                port: number for (name, port), number in self.link_numbers.items() if name == device
            }
            self.witness[device] = gpu.witness
        else:
            engine = bench.engine(function)
            assert engine.witness is not None
            member["engine"] = engine.number
            self.witness[device] = engine.witness
        return member

    # --- the agent

    def call(self, method: str, **params: Any) -> Any:
        """One of the methods ``protocol.*``."""
        return self.node.agent.call(f"protocol.{method}", _CALL_TIMEOUT_S, **params)

    def run(self, *steps: Step) -> list[Any]:
        """Do steps; FAIL if one is refused."""
        answers = self.attempt(*steps)
        refused = refusal_of(answers)
        if refused is not None:
            step = steps[len(answers) - 1]
            raise Refuted(f"{step['do']} was refused: {refused['type']}: {refused['message']}")
        return answers

    def attempt(self, *steps: Step) -> list[Any]:
        """Do steps; the answers end with the first that is refused."""
        answers: list[Any] = self.call("run", steps=list(steps))
        return answers

    def refused(self, *steps: Step) -> dict[str, Any]:
        """Do steps of which the last is refused, and only that; FAIL if it is not."""
        answers = self.attempt(*steps)
        refused = refusal_of(answers)
        if refused is None:
            raise Refuted(f"{steps[-1]['do']} was to be refused: {answers[-1]}")
        if len(answers) < len(steps):
            step = steps[len(answers) - 1]
            raise Refuted(f"{step['do']} was refused: {refused['type']}: {refused['message']}")
        return refused

    def events(self) -> list[dict[str, Any]]:
        """What happened since this was last asked; kept in the run folder, a line each."""
        found: list[dict[str, Any]] = self.call("events", after=self._after)["events"]
        if found:
            self._after = found[-1]["number"]
            with self._events_file.open("a") as file:
                file.writelines(json.dumps({"node": self.node.name, **e}) + "\n" for e in found)
        return found

    def clean(self) -> dict[str, Any]:
        """End everything in the room, and keep its events."""
        self.events()
        ends = [end for link in self.links for end in link["ends"]]
        self.run(*(do("link", device=device, port=port, up=True) for device, port in ends))
        left: dict[str, Any] = self.call("clean")
        self.call("rules", policy="best-quality", forwards=True)
        self.events()
        return left

    def close(self) -> None:
        """End the room and give the devices back."""
        self.call("close")
        for bench in self._benches:
            bench.close()

    # --- offers

    def gpu_offers(self, device: str, *kinds: str) -> list[Offer]:
        """A GPU's list: its links, PCIe, RAM; of these ``kinds`` if any are named, in order."""
        links = [
            {"kind": link["kind"], "device": device, "port": port}
            for link in self.links
            for name, port in link["ends"]
            if name == device
        ]
        known: dict[str, list[Offer]] = {
            "link": links,
            "pcie": [{"kind": "pcie", "device": device}],
            "scatter-list": [{"kind": "scatter-list", "device": device}],
            "system": [{"kind": "system", "device": device, "placements": ["system"]}],
        }
        return [offer for kind in kinds or ("link", "pcie", "system") for offer in known[kind]]

    # --- what was seen

    def memory(self, where: Mapping[str, Any]) -> tuple[Memory, int]:
        """The memory that a step's answer names, and the offset in it."""
        if where["placement"] == "device":
            return self.vram[where["device"]], where["offset"]
        name = where["ram"]
        return Memory(self.node, name, 0, {"ram": name}), where["offset"]

    def holds(self, where: Mapping[str, Any], seed: int, size_bytes: int) -> Judgement:
        """Are the bytes of the pattern there, as guest and host see it?"""
        memory, offset = self.memory(where)
        return memory.judge(offset, pattern(seed, 0, size_bytes))

    def watch(self, device: str) -> PathWatch:
        """By which paths a device moves bytes in a ``with`` block."""
        return PathWatch(self.witness[device])

    def faults(self) -> FaultWatch:
        """IOMMU faults in a ``with`` block."""
        return self._benches[0].watch()


def refusal_of(answers: Sequence[Any]) -> dict[str, Any] | None:
    """The refusal that ended a list of answers."""
    last = answers[-1] if answers else None
    if isinstance(last, dict) and isinstance(last.get("refused"), dict):
        return dict(last["refused"])
    return None


def links_of(plan: RackPlan, node: str) -> tuple[list[dict[str, Any]], dict[tuple[str, str], int]]:
    """The private links between GPU models of a node, as the core's tables want them; and by
    (device, port) the GPU's own number of each, which counts all of its links.

    A link is named after its ends (``gpu0-gpu1``), and so are its ports.
    """
    links: list[dict[str, Any]] = []
    numbers: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}
    for link in plan.topology.links:
        ends = [(at, gpu) for at, _, gpu in (end.partition("/") for end in link.between)]
        if not all(_is_model(plan, *end) for end in ends):
            continue  # there is no such wire
        inside = link.kind != "ual" and all(at == node for at, _ in ends)
        name = "-".join(gpu for _, gpu in ends)
        for at, gpu in ends:
            if at != node:
                continue
            if inside:
                numbers[gpu, name] = counts.get(gpu, 0)
            counts[gpu] = counts.get(gpu, 0) + 1
        if inside:
            pairs = [[gpu, name] for _, gpu in ends]
            links.append({"kind": link.kind, "name": name, "ends": pairs, "width": link.width})
    return links, numbers


def _is_model(plan: RackPlan, node: str, device: str) -> bool:
    return any(f.kind == "model" for f in plan.nodes[node].of_device(device))


def tables(
    plan: NodePlan, topology: Topology, links: Sequence[Mapping[str, Any]], devices: Sequence[str]
) -> dict[str, Any]:
    """What the core is told of the node: facts of each path, from its placement."""
    spec = topology.nodes[plan.name]
    redirecting = redirecting_ports(plan, spec)
    iommu = spec.iommu.kind != "none" and spec.iommu.mode not in ("off", "passthrough")
    engines = {f.device: f for f in plan.by_role(Role.ENGINE)}
    memories = {f.device: f for f in plan.by_role(Role.VRAM)}
    pcie = []
    for exporter in devices:
        for importer in devices:
            if exporter != importer and exporter in memories:
                peer, requester = memories[exporter], engines[importer]
                facts = pcie_facts(plan, requester, peer, redirecting, iommu=iommu)
                pcie.append({"exporter": exporter, "importer": importer, **facts})
    system = {
        device: {
            "hops": len(ports_above(plan, engines[device])),
            "redirects": [],
            "host_bridge": True,
            "iommu": iommu,
            "width": 16,
        }
        for device in devices
    }
    return {"pcie": pcie, "system": system, "links": list(links)}


def pcie_facts(
    plan: NodePlan,
    requester: Function,
    peer: Function,
    redirecting: frozenset[str],
    *,
    iommu: bool,
) -> dict[str, Any]:
    """Hops, redirects and who translates, on the way of the requester's DMA to the peer."""
    up, down = ports_above(plan, requester), ports_above(plan, peer)
    common = [port for port in up if port in down]
    ingress = ingress_port(plan, requester, peer)
    redirects = [ingress.name] if ingress is not None and ingress.bdf in redirecting else []
    host_bridge = not common or bool(redirects)
    hops = len(up) + len(down) - 2 * len(common)
    return {
        "hops": hops,
        "redirects": redirects,
        "host_bridge": host_bridge,
        "iommu": iommu and host_bridge,
        "width": 16,
        "distance": hops,
    }


def require_three(board: NegotiationBoard, *, chain: bool = False) -> tuple[str, str, str]:
    """``(a, b, c)``: a and b are linked, a and c are not; in a ``chain`` b and c are linked too.

    Raises:
        CapabilityMissing: this rack has no such three.
    """
    pairs = {frozenset(device for device, _ in link["ends"]) for link in board.links}
    for a, b, c in permutations(board.gpus, 3):
        joined = frozenset((a, b)) in pairs and frozenset((a, c)) not in pairs
        if joined and (frozenset((b, c)) in pairs or not chain):
            return a, b, c
    raise CapabilityMissing(
        "three GPU models of which two are linked and one is not"
        + (" linked to the first but to the second, as in partial-mesh" if chain else "")
    )


__all__ = ["NegotiationBoard", "Offer", "Step", "do", "links_of", "require_three", "tables"]
