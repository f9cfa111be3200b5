# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates and times."""

from __future__ import annotations

import pytest

from testbed.topology.units import (
    SizeError,
    format_duration,
    format_rate,
    format_size,
    is_power_of_two,
    parse_duration,
    parse_rate,
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


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("25GB/s", 25 * 10**9),
        ("31.5 GB/s", 315 * 10**8),
        ("200Gbit/s", 25 * 10**9),
        ("1GiB/s", 1 << 30),
        ("8bit/s", 1),
    ],
)
def test_rates_are_decimal(text: str, bytes_per_s: int) -> None:
    assert parse_rate(text) == bytes_per_s
    assert parse_rate(format_rate(bytes_per_s)) == bytes_per_s


@pytest.mark.parametrize(("text", "time_ns"), [("2us", 2000), ("1.5ms", 1_500_000), ("0s", 0)])
def test_times(text: str, time_ns: int) -> None:
    assert parse_duration(text) == time_ns
    assert parse_duration(format_duration(time_ns)) == time_ns


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("25G", "25GB/s"), ("25gb/s", "25GB/s"), ("3", ""), ("x", ""), ("1bit/s", "")],
)
def test_what_is_no_rate(text: str, nearest: str) -> None:
    with pytest.raises(SizeError) as caught:
        parse_rate(text)
    assert caught.value.nearest == nearest


def test_powers_and_multiples() -> None:
    assert [n for n in range(-2, 17) if is_power_of_two(n)] == [1, 2, 4, 8, 16]
    assert [power_of_two_at_least(n) for n in (0, 1, 2, 3, 4, 5)] == [1, 1, 2, 4, 4, 8]
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
