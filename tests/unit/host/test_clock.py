# SPDX-License-Identifier: Apache-2.0
"""How fast this host's time stamp counter runs, as /proc/cpuinfo tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.host.clock import tsc_khz

CPUINFO = """\
processor\t: 0
model name\t: a processor
cpu MHz\t\t: 1450.004
flags\t\t: fpu tsc {flag} nonstop_tsc
bogomips\t: {bogomips}
"""


@pytest.mark.parametrize(
    ("flag", "bogomips", "khz"),
    [
        ("constant_tsc", "5192.25", 2_596_000),
        ("constant_tsc", "4800.00", 2_400_000),
        ("constant_tsc", "5987.16", 2_994_000),
        ("ht", "5192.25", 0),  # then it is a loop's count, of no use
        ("constant_tsc", "38.40", 0),
        ("constant_tsc", "many", 0),
    ],
)
def test_the_frequency(tmp_path: Path, flag: str, bogomips: str, khz: int) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO.format(flag=flag, bogomips=bogomips) * 2)
    assert tsc_khz(file) == khz


def test_no_such_file(tmp_path: Path) -> None:
    assert tsc_khz(tmp_path / "cpuinfo") == 0
