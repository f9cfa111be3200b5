# SPDX-License-Identifier: Apache-2.0
"""Random topologies that are right: the same seed gives the same one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

MOST_DEPTH = 3
MOST_BUSES = 200  # each switch below costs two, each device below a switch one


class _Maker:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311  # nothing secret
        self.names = (f"d{number}" for number in itertools.count())
        self.buses = 0
        self.io_devices = 0

    def device(self) -> dict[str, Any]:
        kind = self.random.choice(("gpu", "gpu", "nic", "nvme", "passthrough"))
        entry: dict[str, Any] = {kind: next(self.names)}
        if kind == "gpu":
            entry["vram"] = self.random.choice(("1M", "16MiB", 1 << 26, "1G"))
            entry["engine"] = self.engine()
            entry["doorbell"] = self.random.random() < 0.5
        elif kind == "nic":
            entry["engine"] = self.engine()
        elif kind == "nvme":
            entry["size"] = self.random.choice(("64M", "1G"))
            if self.random.random() < 0.5:
                entry["cmb"] = "16M"
        else:
            entry = {"nic": entry[kind], "engine": "edu"}
        return entry

    def engine(self) -> str:
        self.io_devices += 1
        return "igb" if self.io_devices <= 14 and self.random.random() < 0.3 else "edu"

    def below(self, depth: int) -> dict[str, Any]:
        if depth == MOST_DEPTH or self.buses > MOST_BUSES or self.random.random() < 0.5:
            return self.device()
        self.buses += 1
        children = []
        for _ in range(self.random.randint(0, 6)):
            self.buses += 1
            children.append(self.below(depth + 1))
        return {
            "switch": next(self.names),
            "acs": self.random.choice(("redirect", "none")),
            "below": children,
        }

    def root_entry(self, slot: int) -> dict[str, Any]:
        if self.random.random() < 0.2:
            entry = self.device()
            if entry.get("engine") == "igb":  # its virtual functions want room on the bus
                entry["engine"] = "edu"
        else:
            self.buses += 1
            acs = self.random.choice(("redirect", "none"))
            entry = {"root_port": next(self.names), "acs": acs, "below": []}
            if self.random.random() < 0.9:
                entry["below"] = [self.below(0)]
        if self.random.random() < 0.2:
            entry["address"] = f"{slot:02x}.0"
        return entry

    def node(self) -> dict[str, Any]:
        kind = self.random.choice(("none", "intel", "amd", "virtio"))
        # From the top down, so that those without an address, which go up, do not meet them.
        entries = [self.root_entry(0x1D - i) for i in range(self.random.randint(1, 8))]
        return {
            "machine": {"vcpus": self.random.randint(1, 4), "memory": "1G"},
            "iommu": {"kind": kind, "scalable": kind == "intel" and self.random.random() < 0.3},
            "pcie": entries,
        }


def random_topology(seed: int) -> dict[str, Any]:
    """A rack of one or two nodes, in the file's own shape."""
    nodes = {}
    for number in range(1 + seed % 2):
        nodes[f"host{number}"] = _Maker(seed * 2 + number).node()
    return {"rack": f"random-{seed}", "nodes": nodes, "links": list(_links(nodes, seed))}


def _links(nodes: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    gpus = [f"{name}/{gpu}" for name, node in nodes.items() for gpu in _gpus(node["pcie"])]
    for first, second in itertools.islice(itertools.pairwise(gpus), seed % 4):
        yield {"kind": "xgmi", "between": [first, second], "width": 1 + seed % 16}


def _gpus(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        if "gpu" in entry:
            yield entry["gpu"]
        yield from _gpus(entry.get("below", []))
