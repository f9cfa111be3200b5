# SPDX-License-Identifier: Apache-2.0
"""A rack's bells, with which its nodes interrupt one another: their server, as a command.

One process a rack serves all (:mod:`testbed.machine.bell_server`), and is the keeper's like any
other. Each bell has a socket of its own in its node's folder, so that it has the same number
whichever machine starts first, and after its machine was started anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from testbed.machine.command import BELL_VECTORS, BELLS_READY, bell_socket
from testbed.machine.processes import HelperCommand
from testbed.topology.plan import Function, RackPlan, Role

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from testbed.machine.bell_server import main; sys.exit(main(sys.argv[2]))"
)
READY_TIMEOUT_S = 20.0


def bells_of(plan: RackPlan) -> list[tuple[str, Function]]:
    """Each bell with its node; the place in the list is its number."""
    return [(name, f) for name, node in plan.nodes.items() for f in node.by_role(Role.BELL)]


def bells_command(plan: RackPlan) -> HelperCommand | None:
    """The server, to be started before any machine; None for a rack without bells."""
    bells = bells_of(plan)
    if not bells:
        return None
    home = bells[0][0]
    sockets = [
        bell_socket(f.qemu_id) if node == home else f"../{node}/{bell_socket(f.qemu_id)}"
        for node, f in bells
    ]
    what = {
        "sockets": sockets,
        "vectors": BELL_VECTORS,
        "memory_bytes": int(bells[0][1].options["bars_bytes"]),
        "ready": BELLS_READY,
    }
    return HelperCommand(
        name="bells",
        node=home,
        argv=(sys.executable, "-I", "-S", "-c", LAUNCHER, str(ROOT), json.dumps(what)),
        ready_file=BELLS_READY,
        ready_timeout_s=READY_TIMEOUT_S,
        makes=(*sockets, BELLS_READY),
    )
