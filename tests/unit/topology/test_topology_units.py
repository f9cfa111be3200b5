# SPDX-License-Identifier: Apache-2.0
"""Sizes."""

from __future__ import annotations

import pytest

from testbed.topology.units import (
    SizeError,
    format_size,
    is_power_of_two,
    parse_size,
    power_of_two_at_least,
    round_up,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("4K", 4096),
        ("4KiB", 4096),
        ("4 KB", 4096),
        ("64m", 64 << 20),
        (" 1G ", 1 << 30),
        ("2TiB", 2 << 40),
    ],
)
def test_reads_what_people_write(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "M", "-1M", "1.5G", "1 M B", "64X", "9" * 30, "8388608T"])
def test_refuses_the_rest(text: str) -> None:
    with pytest.raises(SizeError):
        parse_size(text)


def test_a_misspelt_unit_has_a_nearest_one() -> None:
    with pytest.raises(SizeError) as caught:
        parse_size("64MiBs")
    assert caught.value.nearest == "64MiB"


@pytest.mark.parametrize("size_bytes", [0, 1, 1000, 1024, 3 << 20, 1 << 30, 5 << 40])
def test_what_is_written_reads_back(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


def test_shortest_form() -> None:
    assert [format_size(n) for n in (1 << 20, 1 << 30, 1536, 1025)] == ["1M", "1G", "1536", "1025"]


def test_powers_and_multiples() -> None:
    assert [n for n in range(-2, 17) if is_power_of_two(n)] == [1, 2, 4, 8, 16]
    assert [power_of_two_at_least(n) for n in (0, 1, 2, 3, 4, 5)] == [1, 1, 2, 4, 4, 8]
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
