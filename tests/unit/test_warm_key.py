# SPDX-License-Identifier: Apache-2.0
"""When a saved machine is the same machine: what its key is made of, each part by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import testbed
from testbed.host import kmod_sources
from testbed.machine import saving
from testbed.machine.command import LaunchContext
from testbed.topology import load, placement
from testbed.warm import wanted as wanted_module
from testbed.warm.wanted import Wanted

TOPOLOGY = """
rack: r
nodes:
  host0:
    machine: {vcpus: 1, memory: 512M}
    pcie:
      - root_port: rp0
        below:
          - switch: sw0
            below:
              - {gpu: gpu0, vram: 32M, engine: model}
              - {nvme: nvme0}
      - {device: mine0, model: "mine.py:Card", options: {depth: 4}, sha256: "DIGEST"}
"""
GPU = "{gpu: gpu0, vram: 32M, engine: model}"


class Host:
    """All that a machine is saved from, to be changed in one place."""

    def __init__(self, folder: Path) -> None:
        self.text = TOPOLOGY.replace("DIGEST", "1" * 64)
        self.code = folder / "models" / "gpu.py"
        self.code.parent.mkdir()
        self.code.write_text("one")
        self.modules = folder / "modules"
        self.modules.write_text("one")
        self.qemu = SimpleNamespace(identity="one")
        self.image = SimpleNamespace(key="one")
        self.agent = SimpleNamespace(hash="one")
        self.kernel = SimpleNamespace(sha256="one", modules=self.modules)
        self.context = LaunchContext(("qemu",), {}, "tcg", Path("kernel"), Path("initrd"))
        self.router = True

    def key(self) -> str:
        """Of the machine that would be saved now."""
        plan = placement.place(load.load_text(self.text, "key.yaml", {}))
        (name,) = plan.nodes
        installation: Any = SimpleNamespace(
            qemu=self.qemu, image=self.image, agent=self.agent, kernel=lambda _: self.kernel
        )
        return Wanted(
            plan.alone(name),
            plan.nodes[name],
            plan.topology.nodes[name],
            installation,
            self.context,
            self.router,
        ).key


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """With device models of its own."""
    monkeypatch.setattr(testbed, "__file__", str(tmp_path / "__init__.py"))
    return Host(tmp_path)


def with_text(before: str, after: str) -> Callable[[Host], None]:
    return lambda host: setattr(host, "text", host.text.replace(before, after))


def with_context(**changes: Any) -> Callable[[Host], None]:
    return lambda host: setattr(host, "context", replace(host.context, **changes))


OTHERS: dict[str, Callable[[Host], Any]] = {
    "a word of the command line": with_text("512M", "448M"),
    "what the models are told": with_text("depth: 4", "depth: 5"),
    "the code of a device of the user's": with_text("1" * 64, "2" * 64),
    "the models' code": lambda host: host.code.write_text("two"),
    "a module of the models' code": lambda host: host.code.rename(host.code.with_name("nic.py")),
    "QEMU": lambda host: setattr(host.qemu, "identity", "two"),
    "QEMU's environment": with_context(environment={"A": "1"}),
    "the accelerator": with_context(accelerator="kvm"),
    "the image": lambda host: setattr(host.image, "key", "two"),
    "the agent": lambda host: setattr(host.agent, "hash", "two"),
    "the kernel": lambda host: setattr(host.kernel, "sha256", "two"),
    "its modules": lambda host: host.modules.write_text("longer"),
    "its words": with_context(kernel_args=("quiet",)),
    "the switches' router": lambda host: setattr(host, "router", False),
}


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_it_is_made_of_makes_it_another(host: Host, what: str) -> None:
    before = host.key()
    assert host.key() == before
    OTHERS[what](host)
    assert host.key() != before


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (wanted_module, "FORMAT", 0),
        (testbed, "__version__", "0"),
        (wanted_module, "_processor", lambda: "another"),
        (kmod_sources, "source_hash", lambda _: "another"),
        (saving, "reset", lambda _: ()),
    ],
)
def test_so_does_what_does_it(
    host: Host, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, value: Any
) -> None:
    host.context = replace(host.context, accelerator="kvm")
    before = host.key()
    monkeypatch.setattr(place, name, value)
    assert host.key() != before


def test_a_name_does_not(host: Host) -> None:
    before = host.key()
    with_text("host0", "host1")(host)
    assert host.key() == before


def test_nor_does_what_goes_wrong_on_purpose(host: Host) -> None:
    before = host.key()
    with_text(GPU, f"{GPU[:-1]}, faults: [drop write nth=3]}}")(host)
    assert "faults" in host.text
    assert host.key() == before
