# SPDX-License-Identifier: Apache-2.0
"""The agent's entry: ``python3 -ISu …/guest_agent/__main__.py``, speaking on stdin and stdout.

Exit status 0 after the other side closed its end, 128 + the signal's number after a signal. With
the word ``listen`` it is the parent of agents instead (:mod:`guest_agent.listener`).
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # -I leaves the script's folder off the path and the package's parent is not installed.
    here = __file__.rpartition("/")[0] or "."
    parent = here.rpartition("/")[0] if "/" in here else os.pardir
    sys.path.insert(0, parent)
    # The folder above the package is named after the agent's content hash when it was shipped.
    folder = parent.rpartition("/")[2]
    agent_hash = folder if folder.isalnum() and len(folder) >= 8 else "dev"
    if sys.argv[1:2] == ["listen"]:
        from guest_agent import listener

        sys.exit(listener.run(agent_hash, sys.argv[2:]))
    from guest_agent import channel

    sys.exit(channel.run(agent_hash))
