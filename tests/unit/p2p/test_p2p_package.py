# SPDX-License-Identifier: Apache-2.0
"""The package as its users meet it: names, example, nothing but the standard library."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import guest_agent.p2p as package
from guest_agent.p2p.addresses import Address
from guest_agent.p2p.clock import MonotonicClock
from guest_agent.p2p.fence import Fence
from tests.unit.p2p.machines import Machine

SOURCES = sorted(Path(str(package.__file__)).parent.glob("*.py"))
OURS = [path for path in SOURCES if path.stem in package._NAMES or path.stem == "__init__"]


def test_the_names_for_type_checkers_are_the_names_that_are_loaded() -> None:
    tree = ast.parse(Path(str(package.__file__)).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    named = {
        (str(node.module).rpartition(".")[2], alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    loaded = {(module, name) for name, module in package._MODULE_OF.items()}
    assert named == loaded
    for module, name in loaded:
        value = getattr(package, name)
        assert value is getattr(importlib.import_module(f"guest_agent.p2p.{module}"), name)
    with pytest.raises(AttributeError, match="has no Bufer"):
        _ = package.Bufer


def test_the_example_runs_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine()
    machine.topology.ways["nic0"] = ("rp0", "sw0", "dp9")  # type: ignore[index]
    code = re.search(r"refuse::\n\n(.*?)\n\n====", str(package.__doc__), re.DOTALL)
    assert code is not None
    seen: list[Address] = []
    space: dict[str, object] = {
        "backend": machine.backend,
        "topology": machine.topology,
        "json": json,
        "nic_send": seen.append,
    }
    exec(textwrap.dedent(code[1]), space)  # noqa: S102
    assert [address.user for address in seen] == ["nic0"]
    events = json.loads(capsys.readouterr().out)["events"]
    assert {"negotiate", "attach", "map", "fence"} <= {event["kind"] for event in events}
    assert len(textwrap.dedent(code[1]).splitlines()) <= 25


def test_the_monotonic_clock_waits_for_real() -> None:
    clock = MonotonicClock()
    context = package.FenceContext("device")
    looks = iter([False, False, True])
    Fence(context, "x", clock.now_ns() + 10**10, lambda: next(looks)).wait(clock)
    with pytest.raises(package.FenceTimeoutError):
        Fence(context, "x", clock.now_ns() + 2_000_000).wait(clock)


def test_importing_the_package_loads_none_of_it() -> None:
    code = "import sys, guest_agent.p2p; print([m for m in sys.modules if 'p2p.' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_needs_nothing_but_the_standard_library() -> None:
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in names:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or name.startswith("guest_agent.p2p"), path


def test_modules_are_of_a_size_that_can_be_read() -> None:
    for path in OURS:
        assert len(path.read_text().splitlines()) <= 400, path
