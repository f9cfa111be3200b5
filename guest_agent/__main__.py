# SPDX-License-Identifier: Apache-2.0
"""The agent's entry: ``python3 -ISu …/guest_agent/__main__.py``, speaking on stdin and stdout.

Exit status 0 after the other side closed its end, 128 + the signal's number after a signal.
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
    from guest_agent import channel

    folder = parent.rpartition("/")[2]
    sys.exit(channel.run(folder if folder.isalnum() and len(folder) >= 8 else "dev"))
