# SPDX-License-Identifier: Apache-2.0
"""One model device of a running rack: what it saw, and what shall go wrong.

For the command line (`testbed devices`, `witness`, `inject`) and for the fixtures of tests alike.
Each call goes to the device's own process (:class:`testbed.models.control.Control`) and raises
DeviceLost if that has died, HostError if it does not answer.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from testbed.errors import Diagnostic, HostError, InputError
from testbed.topology.fault_rules import name_of, parse_rules, rule_data
from testbed.topology.plan import MODEL_KINDS, NodePlan
from testbed.topology.problem import listing, nearest
from testbed.topology.units import NS_PER_S, SizeError, parse_duration, parse_rate

KILL_TIMEOUT_S: Final = 5.0
LINK_CHANGES: Final = ("down", "up", "narrow", "slow", "restore")
LINK_EXPECTED: Final = "down, up, restore, narrow=LANES, or slow=BANDWIDTH[,LATENCY]"


class Models(Protocol):
    """A node's device models."""

    def call(self, method: str, **params: Any) -> Any:
        """See :class:`testbed.machine.models.Models`."""


class Node(Protocol):
    """What is needed of a node of a rack."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def plan(self) -> NodePlan:
        """What stands in it."""

    @property
    def models(self) -> Models:
        """Its device models."""


Nodes = Mapping[str, Node]


@dataclass(frozen=True)
class Seen:
    """What a device did in a span of time.

    ``paths``   bytes read and written, by path (:class:`testbed.models.witness.Path`).
    ``events``  how often what happened (:class:`testbed.models.witness.Event`).
    """

    paths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, counters: Mapping[str, Mapping[str, int]]) -> Seen:
        """From the counters of a device."""
        paths = {
            path: (count["read_bytes"], count["written_bytes"])
            for path, count in counters.items()
            if path != "events"
        }
        return cls(paths, dict(counters["events"]))

    def since(self, before: Seen) -> Seen:
        """What came after ``before``."""
        return Seen(
            {
                path: (read - before.paths[path][0], wrote - before.paths[path][1])
                for path, (read, wrote) in self.paths.items()
            },
            {event: count - before.events[event] for event, count in self.events.items()},
        )

    def read_bytes(self, path: str) -> int:
        """Bytes that it read by that path; KeyError if there is no such path."""
        return self.paths[path][0]

    def written_bytes(self, path: str) -> int:
        """Bytes that it wrote by that path; KeyError if there is no such path."""
        return self.paths[path][1]


class Watch:
    """A span of time as a ``with`` block; ``seen`` is what the device did in it, once it is over.

    Before that, ``seen`` is what it did until now.
    """

    def __init__(self, device: ModelDevice) -> None:
        self._device = device
        self._before = Seen()
        self._after: Seen | None = None

    def __enter__(self) -> Watch:
        self._before = self._device.seen()
        self._after = None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._after = self._device.seen().since(self._before)

    @property
    def seen(self) -> Seen:
        """See the class."""
        return self._after or self._device.seen().since(self._before)


@dataclass(frozen=True)
class LinkChange:
    """What becomes of a private link; parameters of the devices' method `link`."""

    params: Mapping[str, Any]

    @classmethod
    def parse(cls, word: str) -> LinkChange:
        """``down``, ``up``, ``narrow=4``, ``slow=1GB/s,5us``, ``restore``. InputError."""
        kind, equals, value = word.partition("=")
        params: dict[str, Any] = {}
        near = ""
        if not equals and kind in ("down", "up", "restore"):
            params = {"restore": True} if kind == "restore" else {"up": kind == "up"}
        elif kind == "narrow" and value.isdecimal():
            params = {"lanes": int(value)}
        elif kind == "slow" and value:
            rate, _, delay = value.partition(",")
            try:
                params["bytes_per_s"] = float(parse_rate(rate))
                params["latency_s"] = parse_duration(delay) / NS_PER_S if delay else 0.0
            except SizeError as error:
                near = f"slow={error.nearest}" if error.nearest else ""
                params = {}
        if not params:
            near = near or (nearest(kind, LINK_CHANGES) if kind not in LINK_CHANGES else "")
            raise InputError(
                diagnostics=[
                    Diagnostic(
                        "--link", 0, 0, f"'{word}' is nothing for a link", LINK_EXPECTED, near
                    )
                ]
            )
        return cls(params)


@dataclass(frozen=True)
class ModelDevice:
    """See the module. ``nodes``: all of its rack, where the other ends of its links are."""

    nodes: Nodes = field(repr=False)
    node: str
    name: str

    def __str__(self) -> str:
        return f"{self.node}/{self.name}"

    def call(self, method: str, **params: Any) -> Any:
        """Any method of the device's process."""
        return self.nodes[self.node].models.call(method, device=self.name, **params)

    # --- what it saw

    def status(self) -> dict[str, Any]:
        """As :func:`statuses`."""
        return statuses(self.nodes[self.node])[self.name]

    def seen(self) -> Seen:
        """Since the rack began."""
        return Seen.of(self.call("counters"))

    def watch(self) -> Watch:
        """Watch what it does while a ``with`` block runs."""
        return Watch(self)

    def trace(self, after: int = 0) -> list[dict[str, Any]]:
        """Its latest accesses and events with a higher sequence number, oldest first."""
        entries: list[dict[str, Any]] = self.call("trace", after=after)
        return entries

    def report(self) -> dict[str, Any]:
        """Counters, all rules there ever were, and what else was done to it on purpose."""
        found: dict[str, Any] = self.call("report")
        return found

    # --- what shall go wrong

    def arm(self, *rules: str, by: str = "command") -> tuple[str, ...]:
        """Arm rules in words (:mod:`testbed.topology.fault_rules`); returns their names.

        :raises InputError: what is wrong with them; then none is armed.
        """
        parsed = parse_rules(rules, by=by)
        for rule in parsed:
            self.call("inject", rule=rule_data(rule))
        return tuple(rule.name for rule in parsed)

    def rules(self) -> list[dict[str, Any]]:
        """The rules that are armed: name, accesses seen, and how many were struck."""
        found: list[dict[str, Any]] = self.call("rules")
        return found

    def disarm(self, rule: str) -> None:
        """Disarm one rule, given by its words; InputError names the nearest if there is none."""
        name = name_of(rule)
        armed = [each["name"] for each in self.rules()]
        if name not in armed:
            near = nearest(name, armed)
            message = f"{self} has no rule '{name}'"
            raise InputError(
                diagnostics=[Diagnostic("--clear", 0, 0, message, listing(armed), near)]
            )
        self.call("clear", name=name)

    def stick(self, *, on: bool = True, by: str = "command") -> None:
        """Its engine takes no command any more, or goes on."""
        self.call("stick", on=on, by=by)

    def lose(self, what: str, count: int = 1, *, by: str = "command") -> None:
        """Lose the next ``count`` (0: none) of its ``doorbell``s or ``interrupt``s."""
        self.call("lose", what=what, count=count, by=by)

    def remove(self, *, by: str = "command") -> None:
        """Pull the card out: it answers as an empty slot does."""
        self.call("remove", by=by)

    def change_link(self, peer: str, change: LinkChange, *, by: str = "command") -> dict[str, Any]:
        """Change a link at both its ends; answers this end's state.

        ``peer`` is ``node/gpu``, or ``gpu`` of the same node.
        """
        peer = peer if "/" in peer else f"{self.node}/{peer}"
        answer: dict[str, Any] = self.call("link", peer=peer, by=by, **change.params)
        self._at(peer).call("link", peer=str(self), by=by, **change.params)
        return answer

    def restore(self) -> None:
        """Undo what can be undone: rules, a stuck engine, losses to come, links at both ends."""
        for peer in self.call("restore")["peers"]:
            self._at(peer).call("link", peer=str(self), restore=True)

    def kill(self) -> None:
        """Kill its process, as a crash of the model would end it, and wait until that is known."""
        status = self.status()
        if status["lost"] is not None:
            raise InputError(f"{self} is lost already")
        os.kill(status["pid"], signal.SIGKILL)
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while self.status()["lost"] is None:
            if time.monotonic() > deadline:
                raise HostError(f"{self}: its process {status['pid']} does not die")
            time.sleep(0.01)

    def _at(self, peer: str) -> ModelDevice:
        node, _, name = peer.partition("/")
        return ModelDevice(self.nodes, node, name)


def model_devices(nodes: Nodes) -> Iterator[ModelDevice]:
    """Every device that a model serves, in the order of the tree."""
    for node in nodes.values():
        names = dict.fromkeys(f.device for f in node.plan.functions if f.kind in MODEL_KINDS)
        for name in names:
            yield ModelDevice(nodes, node.name, name)


def statuses(node: Node) -> dict[str, dict[str, Any]]:
    """Of each model device, by name: connected, pid, lost (exit status or None), failure."""
    found: list[dict[str, Any]] = node.models.call("devices")
    return {status["device"]: status for status in found}


def find_device(nodes: Nodes, word: str) -> ModelDevice:
    """``gpu0`` if only one node has such a device, or ``host0/gpu0``.

    :raises InputError: there is none, none that a model serves, or several.
    """
    devices = list(model_devices(nodes))
    found = [device for device in devices if word in (device.name, str(device))]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"'{word}' is in several nodes: {', '.join(map(str, found))}")
    node, _, name = word.rpartition("/")
    for other in nodes.values():
        kinds = [f.kind for f in other.plan.functions if f.device == name]
        if kinds and node in ("", other.name):
            raise InputError(
                f"{other.name}/{name} is no model device: QEMU has no such witness",
                hint="`engine: model` in the topology makes a GPU or NIC one",
            )
    words = [word for device in devices for word in (device.name, str(device))]
    known = listing(map(str, devices)) or "none: `engine: model` makes one"
    raise InputError(
        diagnostics=[
            Diagnostic(word, 0, 0, "no such device", f"one of {known}", nearest(word, words))
        ]
    )
