# SPDX-License-Identifier: Apache-2.0
"""A QEMU that answers QMP about its PCI tree, and can be made to fail at it."""

from __future__ import annotations

import asyncio
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

MIB = 1 << 20
ECAM = 0xE000_0000
ACS_AT = 0x148
GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}


class FakeMachine:
    """A root port, a switch with two ports, and a GPU of two functions below each.

    ``acs`` is the control register of the first port, by address; a port that is not in it has no
    such capability. ``fail`` maps a command to how it fails: ``hang``, ``close`` or ``refuse``.
    """

    def __init__(self, path: Path, log: Path) -> None:
        self.path = path
        self.log = log
        self.acs: dict[tuple[int, int], int] = {}
        self.fail: dict[str, str] = {}
        self.greeting = json.dumps(GREETING).encode() + b"\n"
        self.asked: Counter[str] = Counter()
        self.traced: list[str] = []
        self.decoding = True
        self.shown_at = ECAM
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> FakeMachine:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()

    def write_config(self, what: str = "sw-port0 02:00.0 @0x14e <- 0x19") -> None:
        """As QEMU logs it."""
        with self.log.open("a") as log:
            log.write(f"pci_cfg_write {what}\n")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        writer.write(self.greeting)
        while line := await reader.readline():
            request = json.loads(line)
            name = request["execute"]
            self.asked[name] += 1
            match self.fail.get(name):
                case "hang":
                    continue
                case "close":
                    break
                case "refuse":
                    answer: dict[str, Any] = {"error": {"class": "GenericError", "desc": "no"}}
                case _:
                    answer = {"return": self._answer(name, request["arguments"])}
            event = json.dumps({"event": "RTC_CHANGE", "data": {}})
            writer.write(event.encode() + b"\n")
            writer.write(json.dumps({**answer, "id": request["id"]}).encode() + b"\n")
        writer.close()

    def _answer(self, name: str, arguments: dict[str, Any]) -> Any:
        match name:
            case "query-pci":
                return self._tree()
            case "qom-get":
                return ECAM
            case "human-monitor-command":
                return self._xp(arguments["command-line"])
            case "trace-event-set-state":
                self.traced.append(arguments["name"])
        return {}

    def _tree(self) -> list[dict[str, Any]]:
        ports = [
            self._bridge(f"sw-port{n}", 2, n, 3 + n, 3 + n, self._gpu(f"gpu{n}", 3 + n))
            for n in range(2)
        ]
        switch = self._bridge("sw", 1, 0, 2, 4, ports)
        root = self._bridge("rp0", 0, 2, 1, 4, [switch])
        host = self._entry("", 0, 0, 0, [], 0x0600)
        return [{"bus": 0, "devices": [host, root]}]

    def _gpu(self, name: str, bus: int) -> list[dict[str, Any]]:
        base = bus * 64 * MIB
        memory = {"type": "memory", "bar": 2, "size": MIB, "address": base}
        if not self.decoding and bus == 4:
            memory["address"] = -1
        registers = {"type": "memory", "bar": 0, "size": 0x4000, "address": base + MIB}
        return [
            self._entry(f"{name}-vram", bus, 0, 0, [memory], 0x0500),
            self._entry(f"{name}-engine", bus, 0, 1, [registers], 0x0302),
        ]

    @staticmethod
    def _entry(
        name: str, bus: int, slot: int, number: int, regions: list[Any], code: int
    ) -> dict[str, Any]:
        return {
            "qdev_id": name,
            "bus": bus,
            "slot": slot,
            "function": number,
            "class_info": {"class": code},
            "id": {"vendor": 0x1B36, "device": bus << 8 | slot},
            "regions": regions,
        }

    def _bridge(
        self, name: str, bus: int, slot: int, first: int, last: int, below: list[Any]
    ) -> dict[str, Any]:
        window = {"base": max(first, 3) * 64 * MIB, "limit": (last + 1) * 64 * MIB - 1}
        closed = {"base": 0xFFF00000, "limit": 0xFFFFF}
        numbers = {"number": bus, "secondary": first, "subordinate": last}
        ranges = {"memory_range": window, "prefetchable_range": closed, "io_range": closed}
        bridge = {"bus": numbers | ranges, "devices": below}
        return self._entry(name, bus, slot, 0, [], 0x0604) | {"pci_bridge": bridge}

    def _xp(self, line: str) -> str:
        _, form, place = line.split()
        count, start = int(form[1:-2]), int(place, 16)
        offset = start - self.shown_at
        config = self._config(offset >> 20, offset >> 15 & 31)
        words = struct.unpack_from(f"<{count}I", config, offset & 0xFFF)
        rows = [words[i : i + 4] for i in range(0, count, 4)]
        return "".join(
            f"{start + 16 * n:016x}: {' '.join(f'{word:#010x}' for word in row)}\r\n"
            for n, row in enumerate(rows)
        )

    def _config(self, bus: int, slot: int) -> bytes:
        config = bytearray(4096)
        struct.pack_into("<HHH", config, 0, 0x1B36, bus << 8 | slot, 0x0007)
        config[0x34] = 0x40
        struct.pack_into("<BB", config, 0x40, 0x0D, 0x54)
        struct.pack_into("<BB", config, 0x54, 0x10, 0)
        struct.pack_into("<I", config, 0x54 + 0x0C, slot << 24)
        struct.pack_into("<I", config, 0x100, 0x1 | 1 << 16)
        control = self.acs.get((bus, slot))
        if control is not None:
            struct.pack_into("<I", config, 0x100, 0x1 | 1 << 16 | ACS_AT << 20)
            struct.pack_into("<IHH", config, ACS_AT, 0xD | 1 << 16, 0x5F, control)
        return bytes(config)
