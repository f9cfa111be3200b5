# SPDX-License-Identifier: Apache-2.0
"""A small report for tests, and what it takes to load one that differs in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from testbed.reports.load import Case, load_bytes

TEXT = """\
title: "a raw address"
link: https://example.org/1
vars: {raw: true}
topology:
  rack: two
  nodes:
    host0:
      machine: {memory: 512M}
      pcie:
        - root_port: rp0
          below: [{gpu: gpu0, vram: 2M, engine: igb}]
        - root_port: rp1
          below: [{gpu: gpu1, vram: 2M, engine: igb}]
        - {nvme: disk, size: 16M, cmb: 1M}
steps:
  - open: [gpu0, gpu1]
  - fill: gpu0.vram
    seed: 1
    as: sent
  - fill: gpu1.vram
    seed: 2
    as: before
  - map: gpu0.vram
    as: source
  - map: gpu1.vram
    raw: {{ raw }}
    as: peer
  - copy: gpu0
    from: ${source.dma_address}
    to: ${peer.dma_address}
    size: 64
    as: dma
  - checksum: gpu1.vram
    size: 64
    as: arrived
expect:
  as_reported:
    it is refused:
      fault: dma
      by: gpu0
      address: ${peer.bus_address}
      access: write
    nothing has arrived:
      bytes: arrived
      are: before
  when_fixed:
    nothing is refused:
      no_fault: dma
    it has arrived:
      bytes: arrived
      are: sent
"""


def edited(*edits: tuple[str, str]) -> str:
    """The text with each first word replaced by the second."""
    text = TEXT
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def case_of(text: str = TEXT, folder: Path | None = None, **options: Any) -> Case:
    settings = options.pop("settings", {})
    return load_bytes(text.encode(), "x.report.yaml", settings, folder=folder or Path(), **options)
