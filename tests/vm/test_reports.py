# SPDX-License-Identifier: Apache-2.0
"""Shipped reports on real machines: REPRODUCED as they stand, FIXED or DIFFERENT if changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.deploy import StartOptions
from testbed.harness.sources import TopologySource
from testbed.reports.judge import Word
from testbed.reports.load import Overrides, load_bytes, shipped_reports
from testbed.reports.reproduce import Finding, reproduce
from testbed.results.evidence import Witness

Happens = Callable[..., Finding]

pytestmark = pytest.mark.timeout(400)

STARTED_OFTEN = ("habanalabs-v3", "dma-buf-8gib")


@pytest.fixture
def happens(cold: StartOptions, warm: StartOptions, tmp_path: Path) -> Happens:
    def run(
        name: str, *edits: tuple[str, str], overrides: Overrides | None = None, **settings: str
    ) -> Finding:
        path = shipped_reports()[name]
        text = path.read_text()
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        case = load_bytes(text.encode(), name, settings, folder=path.parent, overrides=overrides)
        options = warm if name in STARTED_OFTEN else cold
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        return reproduce(case, TopologySource(case.topology, folder, options=options))

    return run


def test_a_raw_address_in_a_dma_buf(happens: Happens) -> None:
    finding = happens("habanalabs-v3")
    assert finding.word is Word.REPRODUCED, finding
    faults = [each for each in finding.evidence if each.kind == "fault"]
    assert {each.witness for each in faults} == {Witness.GUEST, Witness.MACHINE}
    assert any("DMAR: [DMA Write NO_PASID]" in str(each) for each in finding.evidence)
    fixed = happens("habanalabs-v3", exporter="fixed")
    assert fixed.word is Word.FIXED, fixed


def test_bytes_that_go_elsewhere_are_different(happens: Happens) -> None:
    """What the report guards, broken: the address is mapped, and leads to the next page."""
    elsewhere = ("ranges: [{offset: 0x40000", "ranges: [{offset: 0x41000")
    finding = happens("habanalabs-v3", elsewhere, exporter="fixed")
    assert finding.word is Word.DIFFERENT, finding
    assert "the bytes have arrived': gaudi.vram+0x40000 does not hold" in finding.reason


def test_a_list_whose_arithmetic_has_32_bits(happens: Happens) -> None:
    finding = happens("dma-buf-8gib")
    assert finding.word is Word.REPRODUCED, finding
    # Neither the mistake nor its absence: an entry is right, and another buffer is read.
    elsewhere = (
        "  - checksum: exporter.vram\n    offset: 8G",
        "  - checksum: exporter.vram\n    offset: 6G",
    )
    finding = happens("dma-buf-8gib", elsewhere, helper="mended")
    assert finding.word is Word.DIFFERENT, finding
    finding = happens("dma-buf-4gib", gib="4")
    assert finding.word is Word.REPRODUCED, finding


def test_what_helped_the_reporter_helps_here(happens: Happens) -> None:
    finding = happens("rccl-1129", overrides=Overrides(iommu_mode="passthrough"))
    assert finding.word is Word.FIXED, finding


def test_commands_configuration_space_and_unplugging(happens: Happens) -> None:
    steps = """  - exec: "echo ${mi0.bdf}; exit 3"
    expect: {status: 3, stdout: "0000:01:00.1"}
  - exec: sleep 60
    timeout: 1
    expect: {timed_out: true}
  - config: mi1
    offset: 0
    width: 2
    as: vendor
  - exec: "cat /sys/bus/pci/devices/${mi1.bdf}/vendor"
    as: told
  - wait: 0.2
"""
    finding = happens("rccl-1129", ("  - wait: 0.2\n", steps))
    assert finding.word is Word.REPRODUCED, finding
    values = {step.words.split()[0]: step.values for step in finding.steps}
    assert int(values["exec"]["stdout"], 16) == values["config"]["value"]
