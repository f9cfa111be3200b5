# SPDX-License-Identifier: Apache-2.0
"""`python -m testbed.models.describe`: what a device of someone's own is, before a rack boots.

Standard input is one JSON object, `{"name", "kind": "FILE.py:CLASS", "options", "sha256",
"timeout_s"}`. The answer on standard output is `{"device": …}`, see :func:`description` of
:mod:`testbed.models.loading`, or `{"error": text}`. Whatever the class prints goes to standard
error. This process has to lead a process group, which ends with it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
from typing import Final

from testbed.errors import InputError
from testbed.models.loading import description, limit_memory, make_own

GRACE_S: Final = 2.0
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


def main() -> int:
    """It ends by SIGKILL when an answer was given."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    question = json.load(sys.stdin)
    timeout_s = question.pop("timeout_s")
    faulthandler.enable()
    # For code that does not even let itself be interrupted.
    faulthandler.dump_traceback_later(timeout_s + GRACE_S, exit=True)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    limit_memory()
    try:
        device = make_own(**question, timeout_s=timeout_s)
        answer: dict[str, object] = {"device": description(device)}
    except InputError as error:
        answer = {"error": error.message}
    answers.write(json.dumps(answer))
    answers.close()
    os.killpg(0, signal.SIGKILL)  # neither its threads and exit handlers nor what it started
    return 0


if __name__ == "__main__":
    sys.exit(main())
