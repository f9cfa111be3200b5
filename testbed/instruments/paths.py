# SPDX-License-Identifier: Apache-2.0
"""By which path a device's bytes went: the device model's own count, a witness beside the bytes.

QEMU's devices keep no count; only the testbed's models do (docs/gpu-model.md). Their rings and
fences are counted too, so that a path that must not be used has none, and one that must be has at
least what was to be moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from testbed.instruments.interface import RackNode
from testbed.results.judging import Judgement, Moved, judge_path
from testbed.results.record import SUITE
from testbed.topology.plan import MODEL_KINDS, Function

_LOSE_RULE = "suite-lost-writes"


@dataclass(frozen=True)
class DeviceWitness:
    """One model device, as its own counters see it."""

    node: RackNode
    device: str

    @classmethod
    def of(cls, node: RackNode, function: Function) -> DeviceWitness | None:
        """The witness of that function, or None if it is no model."""
        return cls(node, function.device) if function.kind in MODEL_KINDS else None

    def moved(self) -> Moved:
        """Bytes read and written by each path, until now."""
        counters: Mapping[str, Mapping[str, int]] = self.node.models.call(
            "counters", device=self.device
        )
        return {
            path: (count["read_bytes"], count["written_bytes"])
            for path, count in counters.items()
            if "read_bytes" in count
        }

    @contextmanager
    def lost_writes(self, iova: int, size_bytes: int) -> Iterator[None]:
        """Inside the block, what the device writes there is lost without its knowing."""
        rule: dict[str, Any] = {
            "name": _LOSE_RULE,
            "action": "drop",
            "by": SUITE,
            "write": True,
            "start": iova,
            "end": iova + size_bytes,
            "count": 0,
        }
        self.node.models.call("inject", device=self.device, rule=rule)
        try:
            yield
        finally:
            self.node.models.call("clear", device=self.device, name=_LOSE_RULE)


class PathWatch:
    """A span of time, as a device's witness counts it; nothing for a device that has none."""

    def __init__(self, witness: DeviceWitness | None) -> None:
        self._witness = witness
        self._before: Moved = {}
        self._after: Moved = {}

    def __enter__(self) -> PathWatch:
        if self._witness is not None:
            self._before = self._witness.moved()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._witness is not None and kind is None:
            self._after = self._witness.moved()

    def judge(self, path: str | None, size_bytes: int) -> Judgement:
        """Did the device write ``size_bytes`` by ``path``, and none past the IOMMU otherwise?"""
        if self._witness is None or path is None:
            return Judgement(True, "by whichever path")
        return judge_path(self._witness.device, self.moved(), path, size_bytes)

    def moved(self) -> Moved:
        """Bytes read and written meanwhile, by path; empty for a device that keeps no count."""
        return {
            name: (read - self._before[name][0], written - self._before[name][1])
            for name, (read, written) in self._after.items()
        }
