# SPDX-License-Identifier: Apache-2.0
"""A node's devices on which the agent runs the protocol core: one address space for each device.

:meth:`NegotiationBoard.run` does steps in the guest (:mod:`guest_agent.p2p_device.steps`), judges
nothing; where bytes are is said by steps, and judged here by the guest's and the host's view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
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
from testbed.instruments.protocol_events import ProtocolEvents
from testbed.results.judging import Judgement
from testbed.topology.interconnects import Offer, links_of, offers_of, tables
from testbed.topology.oracle import iommu_groups
from testbed.topology.plan import Function, RackPlan, Role

BUFFERS_AT = 1 << 20  # in each video memory
BUFFERS_BYTES = 4 << 20
_IOVA_BYTES = 1 << 30
PREFIX = "nego-"
GPUS, NICS = 4, 2  # so many take part in any case
_CALL_TIMEOUT_S = 120.0  # the first loads the whole core: seconds on an emulated CPU, more if busy

Step = Mapping[str, Any]


def do(name: str, /, **parts: Any) -> dict[str, Any]:
    """One step."""
    return {"do": name, **parts}


def takes_part(plan: RackPlan, node: str) -> tuple[list[Function], list[Function]]:
    """The GPU models and NIC models of a node with which negotiations are shown, in order.

    Each needs an address space of its own: of devices that share an IOMMU group, the first takes
    part. Of more than :data:`GPUS` GPUs and :data:`NICS` NICs those do that add a kind of path:
    to open a device takes an emulated machine half a second.
    """
    machine, topology = plan.nodes[node], plan.topology
    groups = iommu_groups(machine, topology.nodes[node])
    group_of = {bdf: number for number, group in enumerate(groups) for bdf in group}
    found: dict[str, list[Function]] = {"model": [], "model-nic": []}
    taken: set[int | str] = set()
    for kind, functions in found.items():
        for function in machine.by_role(Role.ENGINE):
            group = group_of.get(function.bdf, function.bdf)
            if function.kind == kind and group not in taken:
                taken.add(group)
                functions.append(function)
    gpus, nics = found["model"], found["model-nic"]
    if len(gpus) <= GPUS and len(nics) <= NICS:
        return gpus, nics
    links, _ = links_of(plan, node)
    facts = tables(machine, topology, links, [f.device for f in (*gpus, *nics)])["pcie"]
    ways = {(way["exporter"], way["importer"]): way for way in facts}
    wires = {frozenset(device for device, _ in link["ends"]): link["kind"] for link in links}

    def path(owner: Function, user: Function) -> object:
        way = ways[owner.device, user.device]
        wire = wires.get(frozenset((owner.device, user.device)))
        return wire, way["hops"], len(way["redirects"]), way["host_bridge"], way["iommu"]

    chosen: list[Function] = []
    seen: set[object] = set()
    for gpu in gpus:
        paths = {path(*pair) for other in chosen for pair in ((other, gpu), (gpu, other))}
        if len(gpus) <= GPUS or len(chosen) < 2 or paths - seen:
            chosen.append(gpu)
            seen |= paths
    if len(nics) > NICS and gpus:
        nics = list({path(gpus[0], nic): nic for nic in reversed(nics)}.values())[::-1]
    return chosen, nics


class NegotiationBoard:
    """Everything of one node opened, and a room of the protocol core in its agent."""

    def __init__(
        self, rack: Rack, node: str, mutation: Mutation, policy: str = "best-quality"
    ) -> None:
        self.policy = policy  # under which every test begins
        self.node: RackNode = rack.nodes[node]
        gpus, nics = takes_part(rack.plan, node)
        self.gpus = [f.device for f in gpus]
        self.nics = [f.device for f in nics]
        links, self.link_numbers = links_of(rack.plan, node)
        self.links = [
            link for link in links if all(device in self.gpus for device, _ in link["ends"])
        ]
        self._topology = rack.topology
        self._events = ProtocolEvents(rack, node, "protocol")
        self.vram: dict[str, Memory] = {}
        self.witness: dict[str, DeviceWitness] = {}
        self.requesters = {f.device: f.bdf for f in (*gpus, *nics)}
        self._benches: list[Bench] = []
        tree = self.node.agent.call("pci.tree")["devices"]
        members = [self._open(index, f, tree) for index, f in enumerate((*gpus, *nics))]
        self.call(
            "open",
            members=members,
            topology=self.facts(),
            policy=policy,
            broken=mutation.removeprefix(PREFIX) if mutation.startswith(PREFIX) else "",
        )
        self.unused: dict[str, int] = self.call("clean")["left"]
        self.broken = ""  # the break in force, of this board alone

    def _open(
        self, index: int, function: Function, tree: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        device = function.device
        bench = Bench.open(self.node, self.node.plan.of_device(device), tree=tree)
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
        return self._events.keep()

    def break_(self, mutation: Mutation) -> None:
        """Break the core until the end of the test: what it leaves in use then is no leak."""
        self.broken = mutation
        self.call("break", name=mutation.removeprefix(PREFIX))

    def mend(self) -> None:
        """End the break, and everything in the room; what it leaves in use counts as unused."""
        self.unused = self.clean()["left"]
        self.broken = ""
        self.call("break", name="")

    def clean(self) -> dict[str, Any]:
        """End everything in the room, and keep its events."""
        self.events()
        ends = [end for link in self.links for end in link["ends"]]
        self.run(*(do("link", device=device, port=port, up=True) for device, port in ends))
        left: dict[str, Any] = self.call("clean")
        self.call("rules", policy=self.policy, forwards=True, topology=self.facts())
        self.events()
        return left

    def close(self) -> None:
        """End the room and give the devices back."""
        self.call("close")
        for bench in self._benches:
            bench.close()

    # --- what the core is told

    def facts(self, *, trusted: bool = True) -> dict[str, Any]:
        """The facts of all paths; ``trusted``: on a host bridge that Linux lets peers through."""
        devices = [*self.gpus, *self.nics]
        return tables(self.node.plan, self._topology, self.links, devices, trusted=trusted)

    def gpu_offers(self, device: str, *kinds: str) -> list[Offer]:
        """A GPU's list: its links, PCIe, RAM; of these ``kinds`` if any are named, in order."""
        return offers_of(self.links, device, *kinds)

    def way(self, exporter: str, importer: str) -> dict[str, Any]:
        """The facts of the importer's path over PCIe to the exporter's memory."""
        for way in self.facts()["pcie"]:
            if (way["exporter"], way["importer"]) == (exporter, importer):
                return {k: v for k, v in way.items() if k not in ("exporter", "importer")}
        raise KeyError(f"{importer} has no path to {exporter}")

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


__all__ = ["NegotiationBoard", "Offer", "Step", "do", "require_three"]
