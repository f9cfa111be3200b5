# SPDX-License-Identifier: Apache-2.0
"""How fast this host's time stamp counter runs, which an emulated machine reads as its own.

A guest that has to find that out measures it against an emulated timer. On a busy host QEMU is set
aside in the middle of that, and Linux takes the wrong result ("PIT calibration deviates from HPET",
"Using PIT calibration value", arch/x86/kernel/tsc.c): its clock then runs 10 to 70 times too fast
for as long as the machine lives, and deadlines in the guest are over before anything has happened.
So the guest is told (``tsc_early_khz=``); what it measures later may mend that by a hundredth.
"""

from __future__ import annotations

import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_STEP_KHZ = 1000  # hosts of one kind differ by less; so their machines have the same words
_ONE_PROCESSOR_BYTES = 8192  # is enough for one; of many the kernel asks each
_PLAUSIBLE_KHZ = range(500_000, 10_000_000)


def tsc_khz(cpuinfo: Path = CPUINFO) -> int:
    """The time stamp counter's frequency, rounded to 1 MHz; 0 if it cannot be told.

    Linux loops by that counter where it runs at a constant rate, and prints that as ``bogomips``:
    twice the frequency in MHz (``calibrate_delay`` in init/calibrate.c, ``lpj_fine``).
    """
    try:
        with cpuinfo.open("rb", buffering=0) as file:
            text = file.read(_ONE_PROCESSOR_BYTES).decode(errors="replace")
    except OSError:
        return 0
    flags = re.search(r"^flags\s*:.*$", text, re.MULTILINE)
    found = re.search(r"^bogomips\s*:\s*(\d+\.\d+)$", text, re.MULTILINE)
    if not flags or not found or "constant_tsc" not in flags[0].split():
        return 0
    khz = round(float(found[1]) / 2 * 1000 / _STEP_KHZ) * _STEP_KHZ
    return khz if khz in _PLAUSIBLE_KHZ else 0
