# SPDX-License-Identifier: Apache-2.0
"""Racks that are restored: as good as booted ones, each its own, and never from a damaged file."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from testbed import deploy
from testbed.harness.sources import TopologySource
from testbed.rack import Rack
from testbed.results.verdicts import Verdict
from testbed.topology import load
from testbed.warm import restore
from testbed.warm.store import MEMORY, Store
from tests.vm.runs import run, was_restored

YEAR_S = 365 * 86400
TOPOLOGY = """
rack: warm
nodes:
  host0:
    machine: {vcpus: 1, memory: 512M}
    pcie:
      - root_port: rp0
        below:
          - switch: sw0
            acs: redirect
            below:
              - {gpu: gpu0, vram: 32M, engine: model, doorbell: true}
              - {gpu: gpu1, vram: 16M, engine: igb}
              - {nvme: nvme0, cmb: 4M}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Saved machines of this module's own."""
    return Store(tmp_path_factory.mktemp("warm"))


@pytest.fixture
def options(
    warm: deploy.StartOptions, cache: Store, monkeypatch: pytest.MonkeyPatch
) -> deploy.StartOptions:
    """Warm starts out of that."""
    monkeypatch.setattr(restore, "store", lambda: cache)
    return warm


def seen(rack: Rack) -> dict[str, object]:
    """What the guest sees of the rack: all of configuration space, addresses, groups, BARs."""
    devices = rack.node().agent.call("pci.tree")["devices"]
    groups: dict[object, set[str]] = {}
    for device in devices:
        groups.setdefault(device["iommu_group"], set()).add(device["bdf"])
    sizes = {
        device["bdf"]: [(bar["index"], bar["size_bytes"]) for bar in device["bars"]]
        for device in devices
    }
    drivers = {device["bdf"]: device["driver"] for device in devices}
    dump = (
        "cd /sys/bus/pci/devices; for d in *; do echo $d $(od -An -v -tx4 -w4096 $d/config); done"
    )
    spaces = rack.node().link.run(dump, timeout_s=60).stdout.decode().splitlines()
    return {"groups": groups, "bars": sizes, "drivers": drivers, "spaces": spaces}


def fresh(rack: Rack) -> tuple[str, ...]:
    """What no two machines may have in common."""
    words = "cat /etc/dropbear/host_key /root/.ssh/authorized_keys | sha256sum; "
    words += "head -c 16 /dev/urandom | sha256sum"
    return tuple(rack.node().link.run(words).stdout.decode().split("\n")[:2])


def test_a_restored_rack_is_as_a_booted_one_and_two_are_two(
    cold: deploy.StartOptions, options: deploy.StartOptions, tmp_path: Path
) -> None:
    topology = load.load_text(TOPOLOGY, "warm.yaml", {})
    with deploy.start(topology, run_dir=tmp_path / "cold", options=cold) as booted:
        wanted = seen(booted)
    with (
        deploy.start(topology, run_dir=tmp_path / "one", options=options) as one,
        deploy.start(topology, run_dir=tmp_path / "two", options=options) as two,
    ):
        assert (was_restored(booted), was_restored(one), was_restored(two)) == (False, True, True)
        assert seen(one) == seen(two) == wanted
        assert not set(fresh(one)) & set(fresh(two))
        assert not (tmp_path / "two" / "saving").exists()


LEAVES_A_TRACE = """
import pytest

def untouched(rack):
    node = rack.node()
    before = node.link.run("cat /run/trace").stdout
    node.link.run("echo was here >>/run/trace")
    return before == b""

def test_first(rack):
    assert untouched(rack.get())

def test_on_the_same_machine(rack):
    assert not untouched(rack.get())

@pytest.mark.pristine
def test_on_another(rack):
    assert untouched(rack.get())

def test_on_that_one_again(rack):
    assert not untouched(rack.get())
"""


@pytest.mark.parametrize("every", [False, True])
def test_a_pristine_machine_is_one_that_no_test_has_used(
    options: deploy.StartOptions, tmp_path: Path, *, every: bool
) -> None:
    # One process imports both; a module has one place.
    suite = tmp_path / f"test_traces_{every}.py"
    suite.write_text(LEAVES_A_TRACE)
    topology = load.load_text(TOPOLOGY, "warm.yaml", {})
    source = TopologySource(topology, tmp_path, options=options)
    ran = run(suite, source, tmp_path, pristine=every)
    failed = {o.test for o in ran.outcomes if o.verdict is not Verdict.PASS}
    assert failed == ({"on_the_same_machine", "on_that_one_again"} if every else set())


LOOKS_AT_DISKS = """
import pytest

def drivers(rack):
    devices = rack.node().agent.call("pci.tree")["devices"]
    return [device["driver"] for device in devices if device["class"] == 0x010802]

def test_says_nothing(rack):
    assert drivers(rack.get()) == ["nvme"]

@pytest.mark.without_disks
def test_looks_at_none(rack):
    assert drivers(rack.get()) == [""]

@pytest.mark.without_disks
def test_looks_all_the_same(rack):
    rack.get().node().agent.call("nvme.namespaces")

def test_looks(rack, disks):
    agent = rack.get().node().agent
    assert len(agent.call("nvme.namespaces")) == len(agent.call("p2pmem.providers")) == 1
"""


def test_disks_have_no_driver_for_who_says_that_it_looks_at_none(
    options: deploy.StartOptions, tmp_path: Path
) -> None:
    suite = tmp_path / "test_disks.py"
    suite.write_text(LOOKS_AT_DISKS)
    topology = load.load_text(TOPOLOGY, "warm.yaml", {})
    source = TopologySource(topology, tmp_path, options=options)
    ran = run(suite, source, tmp_path, pristine=True)
    found = {outcome.test: outcome for outcome in ran.outcomes}
    told = found.pop("looks_all_the_same")
    assert told.verdict is Verdict.ERROR
    assert "`without_disks`" in told.reason
    assert {outcome.verdict for outcome in found.values()} == {Verdict.PASS}


def test_its_clock_is_the_hosts_however_that_jumped(
    options: deploy.StartOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = load.load_text(TOPOLOGY, "warm.yaml", {})
    later_s = time.time() + YEAR_S
    clock = SimpleNamespace(time=lambda: later_s, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(restore, "time", clock)
    with deploy.start(topology, run_dir=tmp_path / "later", options=options) as rack:
        says_s = int(rack.node().link.run("date +%s").stdout)
    assert later_s - 1 <= says_s < later_s + YEAR_S / 2
    assert not (tmp_path / "later" / "saving").exists()


def test_a_save_that_fails_is_said_and_the_machine_boots(
    options: deploy.StartOptions,
    cache: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    topology = load.load_text(TOPOLOGY.replace("512M", "448M"), "warm.yaml", {})
    # QEMU's own file, on a disk that is always full.
    monkeypatch.setattr(restore, "STATE", "../../../../../../../../../dev/full")
    before = {each.key for each in cache.kept()}
    with deploy.start(topology, run_dir=tmp_path / "boot", options=options) as rack:
        assert rack.alive
        assert not was_restored(rack)
    assert "booted without being saved" in capsys.readouterr().err
    assert {each.key for each in cache.kept()} == before


def test_a_damaged_file_is_not_used(
    options: deploy.StartOptions, cache: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topology = load.load_text(TOPOLOGY, "warm.yaml", {})
    with deploy.start(topology, run_dir=tmp_path / "save", options=options):
        pass
    (entry,) = cache.kept()
    path = cache.folder / entry.key / MEMORY
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with deploy.start(topology, run_dir=tmp_path / "boot", options=options) as rack:
        assert rack.alive
        assert not was_restored(rack)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "not as it was written" in said
    assert cache.kept() == []
