# SPDX-License-Identifier: Apache-2.0
"""Doing the steps on machines: their slots and ports, shell, kernel and agent, and time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from testbed.guest import modules
from testbed.instruments.devices import find_device
from testbed.instruments.faults import FaultWatch, watch_machine
from testbed.reports.guest import read_config, run_command, write_config
from testbed.reports.holdings import Holdings
from testbed.reports.model import Report
from testbed.reports.references import Scope, resolve
from testbed.reports.seen import Seen
from testbed.reports.steps import (
    Acs,
    Call,
    Config,
    Exec,
    Inject,
    KernelLog,
    Module,
    Unplug,
    Wait,
)
from testbed.results.judging import PAGE_BYTES

_POLL_S = 0.05
_ACS_REDIRECT = 0x04 | 0x08  # P2P request redirect, P2P completion redirect


class KernelLogs:
    """How far the kernels' messages have been read by now."""

    def __init__(self, held: Holdings, report: Report) -> None:
        self._held = held
        self._marks = {
            name: node.agent.call("kmsg.mark")["sequence"]
            for name, node in held.rack.nodes.items()
            if any(isinstance(step, KernelLog) for step in report.steps)
        }

    def read(self, step: KernelLog) -> Seen:
        """The messages since the last one."""
        node = self._held.node(step.node)
        records = node.agent.call("kmsg.since", sequence=self._marks[node.name])["records"]
        self._marks[node.name] = node.agent.call("kmsg.mark")["sequence"]
        lines = tuple(r["text"] for r in records if step.words in r["text"])
        return Seen({"count": len(lines), "lines": "\n".join(lines)}, lines=lines)


def module(held: Holdings, step: Module) -> Seen:
    """Load a module of ours, or unload it."""
    act = modules.unload if step.unload else modules.load
    act(held.real_node(step.node), step.module)
    return Seen()


def acs(held: Holdings, step: Acs) -> Seen:
    """Peer-to-peer redirect of ports, on or off."""
    node, functions = held.functions(step.port)
    ports = [function for function in functions if function.acs]
    control = _ACS_REDIRECT if step.redirect else 0
    agent = held.node(node).agent
    before = [agent.call("acs.set", device=f.bdf, control=control)["old"] for f in ports]
    return Seen({"ports": len(ports), "before": before[0]})


def config(held: Holdings, step: Config, scope: Scope) -> Seen:
    """A word of configuration space, written first if it has a value."""
    node, functions = held.functions(step.device)
    guest, bdf = held.real_node(node), functions[0].bdf
    if step.value is not None:
        write_config(guest, bdf, step.offset, step.width, resolve(step.value, scope))
    return Seen({"value": read_config(guest, bdf, step.offset, step.width)})


def inject(held: Holdings, step: Inject) -> Seen:
    """Let a model do something wrong."""
    find_device(held.rack.nodes, step.device).arm(step.rule, by="report")
    return Seen()


def unplug(held: Holdings, step: Unplug) -> Seen:
    """Pull a device out, and wait until it has gone."""
    name, functions = held.functions(step.device)
    node = held.node(name)
    wanted = {function.qemu_id for function in functions}
    node.qmp("device_del", id=functions[0].qemu_id)
    deadline_s = time.monotonic() + step.timeout_s
    while True:
        present = {each["name"] for each in node.qmp("qom-list", path="/machine/peripheral")}
        if not wanted & present or time.monotonic() > deadline_s:
            return Seen({"gone": not wanted & present})
        time.sleep(_POLL_S)


def execute(held: Holdings, step: Exec, scope: Scope) -> Seen:
    """A command in the guest's shell."""
    command = resolve(step.command, scope)
    return Seen(run_command(held.real_node(step.node), command, step.timeout_s))


def wait(held: Holdings, step: Wait) -> Seen:
    """Time goes by; a machine that dies meanwhile ends it."""
    deadline_s = time.monotonic() + step.seconds
    while (left_s := deadline_s - time.monotonic()) > 0:
        for node in held.rack.nodes.values():
            if not node.alive:
                node.agent.call("system.info")  # raises what became of it
        time.sleep(min(left_s, _POLL_S))
    return Seen()


def call(held: Holdings, step: Call, scope: Scope) -> Seen:
    """A method of the agent."""
    parameters = resolve(step.parameters, scope)
    node = held.node(step.node)
    if not step.watch:
        return Seen(dict(_flat(node.agent.call(step.method, step.timeout_s, **parameters))))
    with FaultWatch(node, machine_watched=watch_machine(node)) as watch:
        answer = node.agent.call(step.method, step.timeout_s, **parameters)
    values = {**dict(_flat(answer)), "faults": watch.window.count}
    return Seen(values, window=watch.window, size_bytes=PAGE_BYTES)


def _flat(answer: Any, prefix: str = "") -> Any:
    """``{"a": {"b": 1}}`` as ``a-b``: 1; a list's entries by their numbers, an answer as `answer`.

    Characters that names do not have (``0000:01:00.0``) become ``-`` too.
    """
    if isinstance(answer, Mapping):
        pairs = answer.items()
    elif isinstance(answer, list):
        pairs = dict(enumerate(answer)).items()
    else:
        yield prefix or "answer", answer
        return
    for key, value in pairs:
        word = "".join(c if c.isalnum() or c == "_" else "-" for c in str(key))
        yield from _flat(value, f"{prefix}-{word}" if prefix else word)
