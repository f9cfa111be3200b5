# SPDX-License-Identifier: Apache-2.0
"""Logs, folded: what matters is lit and kept, the rest is bounded, and what is cut is said."""

from __future__ import annotations

import pytest

from testbed.page import logs
from testbed.page.logs import Fold, Kind, Line, Mark, view


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("[    3.1] Kernel panic - not syncing: Fatal exception", Kind.OOPS),
        ("[    3.1] BUG: kernel NULL pointer dereference, address: 0", Kind.OOPS),
        ("[    3.1] Oops: 0002 [#1] SMP", Kind.OOPS),
        ("[    3.1] BUG: KASAN: use-after-free in x", Kind.OOPS),
        ("[    3.1] INFO: task x:1 blocked for more than 120 seconds.", Kind.OOPS),
        ("DMAR: [DMA Write NO_PASID] Request device [02:00.1] fault addr 0x1000", Kind.FAULT),
        ("DMAR: DRHD: handling fault status reg 2", Kind.FAULT),
        ("vtd_dmar_fault sid 0x301 fault 5 addr 0x1 write 1", Kind.FAULT),
        ("AMD-Vi: Event logged [IO_PAGE_FAULT device=00:00.0]", Kind.FAULT),
        ("virtio_iommu: page fault from EP 8 at 0x1", Kind.FAULT),
        ("WARNING: CPU: 0 PID: 1 at mm/x.c:1", Kind.WARNING),
        ("x: loading out-of-tree module taints kernel.", Kind.WARNING),
        ("pci 0000:00:01.0: BAR 0: assigned", None),
        ("testbed: ready", None),
    ],
)
def test_lines_are_lit_for_what_they_say(line: str, kind: Kind | None) -> None:
    assert logs.classify(line) is kind


def lines(count: int, special: dict[int, bytes] | None = None) -> bytes:
    return b"".join((special or {}).get(n, b"line %d" % n) + b"\n" for n in range(count))


def test_a_short_log_is_whole() -> None:
    found = view("console.log", lines(20))
    assert [part.text for part in found.parts if isinstance(part, Line)] == [
        f"line {n}" for n in range(20)
    ]
    assert not found.cut


def test_what_matters_stands_with_its_neighbours_and_the_rest_is_folded() -> None:
    found = view("console.log", lines(200, {100: b"BUG: x"}))
    shown = [part.number for part in found.parts if isinstance(part, Line)]
    assert shown == [*range(1, 13), *range(98, 105), *range(189, 201)]
    assert [part.count for part in found.parts if isinstance(part, Fold)] == [85, 84]
    assert found.lit == {Kind.OOPS: 1}
    assert not found.cut


def test_of_a_long_log_folded_lines_go_first_and_it_is_said() -> None:
    found = view("console.log", lines(9000, {5000: b"BUG: x"}))
    kept = sum(len(p.lines) if isinstance(p, Fold) else 1 for p in found.parts)
    assert kept == logs.MOST_LINES
    assert sum(part.missing for part in found.parts if isinstance(part, Fold)) == 9000 - kept
    assert "7,500 of 9,000 lines read are left out" in found.cut
    assert any(isinstance(part, Line) and part.kind is Kind.OOPS for part in found.parts)


def test_a_flood_of_warnings_does_not_hide_the_oops() -> None:
    special = dict.fromkeys(range(8000), b"WARNING: again") | {7000: b"Kernel panic - not syncing"}
    found = view("console.log", lines(8000, special))
    assert any(isinstance(part, Line) and part.kind is Kind.OOPS for part in found.parts)
    assert sum(isinstance(part, Line) for part in found.parts) <= logs.MOST_LINES


def test_the_seam_of_a_log_that_was_not_read_whole_is_told() -> None:
    found = view("qemu.log", lines(30), b"half\n" + lines(30), cut_bytes=12345)
    texts = [part.text for part in found.parts if isinstance(part, Line)]
    assert "half" not in texts
    assert "12,345 bytes in its middle were not read" in found.cut


def test_escape_sequences_and_endless_lines_are_made_plain() -> None:
    found = view("console.log", b"\x1b[31mred\x1b[0m \x00\x07\xff\n" + b"y" * 100_000 + b"\n")
    one, other = [part for part in found.parts if isinstance(part, Line)]
    assert one.text == "red"
    assert len(other.text) < 2100
    assert "(100,000 characters)" in other.text


def test_a_mark_stands_where_the_test_first_said_something() -> None:
    mark = Mark(16, 30, "MAP-01 x", "t-map-01")
    silent = Mark(5, 5, "MAP-02 y", "t-map-02")
    found = view("console.log", lines(10), marks=[silent, mark])
    names = [type(part).__name__ for part in found.parts]
    assert names == ["Line"] * 3 + ["Mark"] + ["Line"] * 7


def test_an_empty_log_is_one() -> None:
    assert view("console.log", b"").parts == ()
