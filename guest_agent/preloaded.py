# SPDX-License-Identifier: Apache-2.0
"""What agents import only when a call needs it, and a machine that is to be saved imports before.

Nobody imports this but :func:`guest_agent.resume.load_agent`, which imports every module: each of
these takes an emulated guest a tenth of a second or two, in a restored one where nothing has been
translated yet, and most tests need all of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import zlib

# What they set up only when they are used for the first time.
ctypes.addressof(ctypes.c_char.from_buffer(bytearray(1)))
hashlib.sha256(b"").hexdigest()
hashlib.shake_128(b"").digest(1)
zlib.crc32(b"")
