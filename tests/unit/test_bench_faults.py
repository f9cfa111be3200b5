# SPDX-License-Identifier: Apache-2.0
"""What is made of page fault latencies."""

from __future__ import annotations

from itertools import pairwise

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from testbed.benchmarks.faults import check, device_times, histogram, spread, text
from testbed.errors import InputError
from testbed.verbs.group import cli

TIMES = st.lists(st.floats(0, 1e7), min_size=1, max_size=50)


@given(TIMES)
def test_every_sample_is_in_the_one_bucket_that_it_belongs_to(values: list[float]) -> None:
    buckets = histogram(values)
    for bucket in buckets:
        inside = [v for v in values if bucket["from"] <= v < bucket["to"]]
        assert len(inside) == bucket["count"]
    assert sum(bucket["count"] for bucket in buckets) == len(values)
    assert all(a["to"] == b["from"] for a, b in pairwise(buckets))


def test_percentiles_are_samples() -> None:
    assert spread([float(n) for n in range(1, 101)]) == {
        "min": 1.0,
        "median": 50.5,
        "p90": 90.0,
        "p99": 99.0,
        "max": 100.0,
    }
    assert set(spread([7.0]).values()) == {7.0}


def test_a_device_s_own_word_is_from_each_fault_to_its_replay() -> None:
    trace = [
        {"what": what, "time_us": at}
        for what, at in [
            ("replays", 1),
            ("page_faults", 10),
            ("write", 11),
            ("replays", 35),
            ("page_faults", 50),
            ("page_faults", 60),
            ("replays", 61),
        ]
    ]
    assert device_times(trace) == [25.0, 1.0]


def test_the_text_has_a_bar_for_every_bucket() -> None:
    values = [3.0, 5.0, 5.0, 17.0]
    series = {
        "device": "gpu", "path": "link", "page_bytes": 4096, "by": "poll", "count": 4,
        "total": spread(values), "seen": spread(values), "serviced": spread(values),
        "done": spread(values), "on_device": spread(values), "histogram": histogram(values),
    }  # fmt: skip
    lines = text({"series": [series]}).splitlines()
    assert lines[0] == "gpu, link, 4 KiB pages, by poll: 4 faults, in us"
    assert [line.split() for line in lines[3:7]] == [
        ["2", "..", "4", "1", "#" * 20],
        ["4", "..", "8", "2", "#" * 40],
        ["8", "..", "16", "0"],
        ["16", "..", "32", "1", "#" * 20],
    ]


def test_no_values_are_an_error_not_a_number() -> None:
    with pytest.raises(ValueError, match="empty"):
        histogram([])


@pytest.mark.parametrize("count", [3, 801])
def test_too_few_or_too_many_faults_are_bad_input(count: int) -> None:
    with pytest.raises(InputError, match=rf"--count: 4 to 800 faults of each kind, not {count}"):
        check(count)


def test_a_rack_that_is_up_is_not_booted_otherwise() -> None:
    words = ["faultlat", "--rack", "r", "-t", "minimal"]
    result = CliRunner().invoke(cli, words)
    assert "--rack uses a rack as it is" in str(result.exception)
