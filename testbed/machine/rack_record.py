# SPDX-License-Identifier: Apache-2.0
"""rack.json: what the command that starts a rack leaves for later ones."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed.errors import HostError, TestbedError

RECORD = "rack.json"
RECORD_VERSION = 1


@dataclass(frozen=True)
class RackRecord:
    """What is in it.

    ``keys_file``  the SSH keys, mode 0600; None if the rack has none.
    ``topology``, ``plan``, ``versions``  plain JSON values.
    """

    name: str
    run_folder: Path
    nodes: tuple[str, ...]
    created_s: float = field(default_factory=time.time)
    keys_file: Path | None = None
    topology: Any = None
    plan: Any = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that :meth:`from_json` understands."""
        return {
            "version": RECORD_VERSION,
            "name": self.name,
            "run_folder": str(self.run_folder),
            "nodes": list(self.nodes),
            "created_s": self.created_s,
            "keys_file": None if self.keys_file is None else str(self.keys_file),
            "topology": self.topology,
            "plan": self.plan,
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RackRecord:
        """:raises HostError: another version of the testbed wrote it."""
        if data.get("version") != RECORD_VERSION:
            raise HostError(
                f"this rack was started by another version of the testbed"
                f" ({RECORD} version {data.get('version')}, not {RECORD_VERSION})",
                hint="end it with that version's 'testbed down'",
            )
        keys_file = data["keys_file"]
        return cls(
            name=data["name"],
            run_folder=Path(data["run_folder"]),
            nodes=tuple(data["nodes"]),
            created_s=data["created_s"],
            keys_file=None if keys_file is None else Path(keys_file),
            topology=data["topology"],
            plan=data["plan"],
            versions=data["versions"],
        )


def read_record(folder: Path) -> RackRecord | None:
    """The rack.json there; None if there is none, or none of this version."""
    try:
        return RackRecord.from_json(json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError, KeyError, TypeError, TestbedError):
        return None
