# SPDX-License-Identifier: Apache-2.0
"""What agents note of the protocol core, kept in the run folder for ``testbed trace``."""

from __future__ import annotations

import json
from typing import Any

from testbed.instruments.interface import Rack
from testbed.results.trace import FILE_NAME

_CALL_TIMEOUT_S = 120.0  # of tens of thousands of events, by an emulated CPU that others want too


class ProtocolEvents:
    """One node's events, a line each in ``protocol-events.jsonl``.

    :param area: whose events: of the agent's methods ``protocol.*`` or ``fabric.*``. They were
        numbered from 1 when this is made.
    """

    def __init__(self, rack: Rack, node: str, area: str) -> None:
        self._rack = rack
        self._node = node
        self._method = f"{area}.events"
        self._after = 0

    def keep(self) -> list[dict[str, Any]]:
        """What happened since this was last asked. :raises TestbedError: the call's."""
        agent = self._rack.nodes[self._node].agent
        answer = agent.call(self._method, _CALL_TIMEOUT_S, after=self._after)
        found: list[dict[str, Any]] = answer["events"]
        if found:
            self._after = found[-1]["number"]
            with (self._rack.run_dir / FILE_NAME).open("a") as file:
                file.writelines(json.dumps({"node": self._node, **e}) + "\n" for e in found)
        return found
