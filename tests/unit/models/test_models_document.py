# SPDX-License-Identifier: Apache-2.0
"""What is written from the register tables is what the tables say now; the tables make sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.models import registers as hw
from testbed.models.access import Cause
from testbed.models.registers_document import ROOT, documents


@pytest.mark.parametrize("path", documents())
def test_it_is_up_to_date(path: Path) -> None:
    written = (ROOT / path).read_text()
    assert written == documents()[path], "run: python -m testbed.models.registers_document"


def test_no_two_registers_share_a_place() -> None:
    for own in (hw.Gpu, hw.Nic):
        places = [int(register) for register in (*hw.Common, *own)]
        assert len(set(places)) == len(places)
        assert not any(place % 4 for place in places)
        links = range(hw.LINK_BASE, hw.LINK_BASE + hw.LINK_STRIDE * hw.MAX_LINKS)
        tables = range(hw.MSIX_TABLE_OFFSET, hw.REGISTER_BAR_BYTES)
        assert not any(place in links or place in tables for place in places)
    assert max(hw.Link) < hw.LINK_STRIDE


def test_no_two_constants_share_a_name() -> None:
    text = documents()[Path("guest_agent/hw/model_registers.py")]
    names = [line.split(" = ")[0] for line in text.splitlines() if " = " in line]
    assert len(set(names)) == len(names)


def test_the_doorbells_have_a_page_of_their_own() -> None:
    page = {register for register in hw.Common if register // 4096 == 1}
    assert page == {hw.Common.DOORBELL_TAIL, hw.Common.DOORBELL_NOTIFY}


def test_every_cause_is_explained() -> None:
    assert set(hw.ERROR_TEXTS) == set(Cause)


def test_records_have_no_holes() -> None:
    for layout in (hw.COMMAND, hw.WORK_REQUEST, hw.FAULT_RECORD):
        assert layout.size_bytes in (32, 64)
        for name, at in layout.offsets().items():
            assert at % {"B": 1, "H": 2, "I": 4, "Q": 8}[layout.items[name].code] == 0, name
