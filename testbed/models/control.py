# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a device's process: what the device saw, and what shall go wrong.

Requests come from the node's control socket (:mod:`testbed.models.hub`). The methods are those of
:class:`Control`, without underscore.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from testbed.errors import InputError
from testbed.models import wire
from testbed.models.engine_device import EngineDevice
from testbed.models.gpu import GpuModel
from testbed.models.inject import Rule
from testbed.models.link import LinkPort
from testbed.models.listener import Listener

MAX_LINE_BYTES: Final = 16 << 20

METHODS: Final = (
    *("devices", "counters", "trace", "reset_trace", "mappings"),
    *("inject", "rules", "clear", "stick", "lose", "link", "remove"),
    *("report", "restore"),
)
REGISTER: Final = "register"  # for peers, not for the control socket's clients
MAX_ACTIONS: Final = 256

_LINK_KEYS: Final = ("lanes", "bytes_per_s", "latency_s")

Params = Mapping[str, Any]
Json = dict[str, Any] | list[Any] | str | None


def _get(params: Params, key: str, kind: type[Any]) -> Any:
    value = params.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"'{key}' is missing or no {kind.__name__}")
    return value


@dataclass
class _Action:
    """Something done on purpose to a part of the device, and whether it was taken back."""

    part: str
    what: str
    by: str
    undone: bool = False


class Control:
    """What can be asked of the devices of one process."""

    def __init__(self, listeners: Mapping[str, Listener]) -> None:
        self._listeners = listeners
        self._actions: deque[_Action] = deque(maxlen=MAX_ACTIONS)

    def call(self, method: str, params: Params) -> Json:
        """Any method by name. InputError if there is none, or the parameters are wrong."""
        if method not in (*METHODS, REGISTER):
            raise InputError(f"no method '{method}'")
        answer: Json = getattr(self, method)(params)
        return answer

    def devices(self, params: Params) -> Json:
        """Every device: name, socket, whether a machine is connected, its model's last failure."""
        del params
        return [
            {
                "device": name,
                "socket": str(listener.path),
                "connected": listener.session is not None,
                "failure": listener.device.failure and listener.device.failure._asdict(),
            }
            for name, listener in self._listeners.items()
        ]

    def counters(self, params: Params) -> Json:
        """{device} → bytes and accesses by path, and events; see `witness.Witness.counters`."""
        return self._device(params).device.witness.counters()

    def trace(self, params: Params) -> Json:
        """{device, after: sequence number or absent} → the trace's entries after it."""
        after = _get(params, "after", int) if "after" in params else 0
        return self._device(params).device.witness.trace(after=after)

    def reset_trace(self, params: Params) -> Json:
        """{device}: counters and trace begin anew."""
        self._device(params).device.witness.reset()
        return None

    def mappings(self, params: Params) -> Json:
        """{device} → what its IOMMU lets it reach at this moment."""
        return [
            {
                "address": mapping.start,
                "size_bytes": mapping.end - mapping.start,
                "memory": mapping.memory.name if mapping.memory else None,
                "offset": mapping.offset,
                "read": mapping.readable,
                "write": mapping.writable,
            }
            for mapping in self._device(params).device.bus.table.mappings()
        ]

    def report(self, params: Params) -> Json:
        """{device} → what is worth keeping of it: counters, every rule there ever was, and what
        else was done to it on purpose. Each says who wanted it (`by`).
        """
        device = self._device(params).device
        return {
            "counters": device.witness.counters(),
            "rules": device.rules.history(),
            "actions": [
                {"what": each.what, "by": each.by, "undone": each.undone} for each in self._actions
            ],
        }

    def inject(self, params: Params) -> Json:
        """{device, rule}: arm a rule; see `inject.Rule`."""
        self._device(params).device.rules.add(Rule.parse(params.get("rule")))
        return None

    def rules(self, params: Params) -> Json:
        """{device} → its rules and how often each has struck."""
        return self._device(params).device.rules.report()

    def clear(self, params: Params) -> Json:
        """{device, name or absent}: disarm one rule, or all."""
        rules = self._device(params).device.rules
        if "name" in params:
            rules.remove(_get(params, "name", str))
        else:
            rules.clear()
        return None

    def stick(self, params: Params) -> Json:
        """{device, on}: its engine takes no command any more, or goes on."""
        on = _get(params, "on", bool)
        self._engine(params).ring.stick(on=on)
        self._undo("engine")
        if on:
            self._note(params, "engine", "engine stuck")
        return None

    def lose(self, params: Params) -> Json:
        """{device, what: "doorbell" | "interrupt", count}: lose the next so many."""
        what, count = _get(params, "what", str), _get(params, "count", int)
        if count < 0:
            raise InputError("'count' is negative")
        if what == "interrupt":
            self._device(params).device.interrupts_to_lose = count
        elif what == "doorbell":
            self._engine(params).doorbells_to_lose = count
        else:
            raise InputError("'what' is doorbell or interrupt")
        self._undo(what)
        if count:
            self._note(params, what, f"{count} {what}{'s' if count > 1 else ''} to be lost")
        return None

    def link(self, params: Params) -> Json:
        """{device, peer, and some of: up, lanes, bytes_per_s, latency_s}: cut or mend the link, use
        fewer lanes, or slow down what this end reads and writes over it; or {restore: true}: as it
        was made.

        → its state, lanes and timing.
        """
        port = self._link(params)
        if "restore" in params:
            port.restore()
        timing = port.timing
        for key in ("bytes_per_s", "latency_s"):
            if key in params:
                timing = replace(timing, **{key: _get(params, key, float)})
        port.timing = timing
        if "lanes" in params:
            port.narrow(_get(params, "lanes", int))
        if "up" in params:
            port.cut(on=not _get(params, "up", bool))
        worse = [f"{key} {params[key]:g}" for key in _LINK_KEYS if key in params]
        if params.get("up") is False:
            worse.append("down")
        if "restore" in params:
            self._undo(f"link {port.end.peer}")
        if worse:
            self._note(
                params, f"link {port.end.peer}", f"link to {port.end.peer}: {', '.join(worse)}"
            )
        return {"state": port.state.name.lower(), "width": port.width, **vars(timing)}

    def register(self, params: Params) -> str:
        """{device, bar, offset, and size_bytes or data}: a peer below the same switch reads or
        writes one of its registers → what was read; bytes are in hexadecimal.
        """
        device = self._device(params).device
        bar, offset = _get(params, "bar", int), _get(params, "offset", int)
        if device.bus.machine is None:
            raise InputError(f"'{device.name}' is gone")
        if not 0 <= bar < wire.Region.ROM:
            raise InputError(f"no BAR {bar}")
        if "data" not in params:
            return device.region_read(bar, offset, _get(params, "size_bytes", int)).hex()
        device.region_write(bar, offset, bytes.fromhex(_get(params, "data", str)))
        return ""

    def remove(self, params: Params) -> Json:
        """{device}: pull the card out: from now on it answers as an empty slot does, until it is
        plugged in again (with QMP, which is also how to unplug it in good order).
        """
        listener = self._device(params)
        if listener.session is None:
            raise InputError(f"no machine has '{listener.device.name}'")
        listener.session.remove()
        self._note(params, "card", "pulled out")
        return None

    def restore(self, params: Params) -> Json:
        """{device}: undo what can be undone: rules, a stuck engine, losses to come, links.

        → {peers}: the links' other ends, which may have to be restored too.
        """
        device = self._device(params).device
        device.rules.clear()
        device.interrupts_to_lose = 0
        if isinstance(device, EngineDevice):
            device.doorbells_to_lose = 0
            device.ring.stick(on=False)
        links = device.links if isinstance(device, GpuModel) else ()
        for port in links:
            port.restore()
            self._undo(f"link {port.end.peer}")
        for part in ("engine", "interrupt", "doorbell"):
            self._undo(part)
        return {"peers": [port.end.peer for port in links]}

    def _note(self, params: Params, part: str, what: str) -> None:
        by = _get(params, "by", str) if "by" in params else "command"
        self._actions.append(_Action(part, what, by))

    def _undo(self, part: str) -> None:
        for action in self._actions:
            action.undone = action.undone or action.part == part

    def _link(self, params: Params) -> LinkPort:
        device = self._device(params).device
        if not isinstance(device, GpuModel) or not device.links:
            raise InputError(f"'{device.name}' has no links")
        peer = _get(params, "peer", str)
        try:
            return device.link_to(peer)
        except KeyError:
            peers = ", ".join(port.end.peer for port in device.links)
            raise InputError(f"'{device.name}' has no link to '{peer}'; it has {peers}") from None

    def _device(self, params: Params) -> Listener:
        name = _get(params, "device", str)
        if name not in self._listeners:
            raise InputError(f"no device '{name}'")
        return self._listeners[name]

    def _engine(self, params: Params) -> EngineDevice[Any]:
        device = self._device(params).device
        if not isinstance(device, EngineDevice):
            raise InputError(f"'{device.name}' has no engine")
        return device


async def serve(stream: socket.socket, control: Control) -> None:
    """Answer requests on ``stream`` until it ends."""
    reader, writer = await asyncio.open_connection(sock=stream, limit=MAX_LINE_BYTES)
    try:
        while line := await reader.readline():
            writer.write(_answer(control, line))
            await writer.drain()
    except (OSError, ValueError):  # the supervisor is gone
        pass
    finally:
        writer.close()


def _answer(control: Control, line: bytes) -> bytes:
    request = json.loads(line)  # by the hub, which has checked what its client said
    number = request["id"]
    try:
        answer = {"id": number, "result": control.call(request["method"], request["params"])}
    except (InputError, ValueError, RecursionError) as error:
        answer = {"id": number, "error": {"type": "InputError", "message": str(error)}}
    return json.dumps(answer).encode() + b"\n"
