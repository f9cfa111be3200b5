# SPDX-License-Identifier: Apache-2.0
"""Whatever numbers and shapes a run folder has: a page, or one clear error; never a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.errors import InputError
from testbed.page.render import render
from testbed.results.record import FILE_NAME
from tests.unit.page.run_folder import MOVED, run_record, write_run

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, math.inf, -math.inf, math.nan, 10**400, "", "x", "\ud800"),
    *([], {}, [[]], {"a": {}}, 2**63, 0.1),
)
METHODS = ("p2p.map_types", "p2p.distance", "kmsg.since", "x")
odd = st.sampled_from(ODD)
record_line = st.fixed_dictionaries({}, optional={"sequence": odd, "time_us": odd, "text": odd})
results = odd | st.fixed_dictionaries(
    {}, optional={"records": odd | st.lists(record_line | odd, max_size=3)}
)
calls = st.fixed_dictionaries(
    {"method": st.sampled_from(METHODS) | odd},
    optional={
        "at_s": odd,
        "elapsed_s": odd,
        "params": odd | st.fixed_dictionaries({"provider": st.just("0000:03:00.0")}),
        "result": results,
        "error": odd | st.fixed_dictionaries({"message": odd}),
    },
)
slow = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@slow
@given(st.lists(calls, max_size=8), st.binary(max_size=60))
def test_observations_of_any_form(lines: list[dict[str, Any]], rubbish: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outcome = replace(MOVED, started_s=1e9)
        run = write_run(Path(folder) / "run", run_record([outcome]), calls=lines)
        with (run / "rack" / "host0" / "observations.jsonl").open("ab") as file:
            file.write(rubbish)
        assert "</html>" in render(run)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in inside:
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += _paths(inner, (*path, key))
    return found


@slow
@given(st.data())
def test_a_record_with_an_odd_value_anywhere(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", run_record())
        content = json.loads((run / FILE_NAME).read_text())
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from(_paths(content)))
            parent = content
            for key in path[:-1]:
                parent = parent[key]
            # A copy: put into itself, a value would have no end.
            parent[path[-1]] = copy.deepcopy(data.draw(odd))
        (run / FILE_NAME).write_text(json.dumps(content))
        with contextlib.suppress(InputError):
            assert "</html>" in render(run, against=run)
