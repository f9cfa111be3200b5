# SPDX-License-Identifier: Apache-2.0
"""A topology that was right is remembered, and nothing else is."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from testbed import chosen_topology
from testbed.chosen_topology import load_topology
from testbed.errors import InputError
from testbed.host import remembered
from testbed.topology import load
from testbed.topology.model import Topology

TEXT = """\
rack: ours
vars: {gpus: 2, sizes: [64M, 128M]}
nodes:
  zulu:
    pcie:
{% for n in range(gpus) %}
      - {gpu: gpu{{n}}, vram: "{{sizes[0]}}", latency: 3us}
{% endfor %}
  alpha: {iommu: {kind: none}}
"""
OWN = """\
rack: ours
nodes:
  host0:
    pcie:
      - {device: card, model: "card.py:Card"}
"""


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read by all rules, in a cache of the test's own."""
    monkeypatch.setenv("TESTBED_CACHE_DIR", str(tmp_path / "cache"))
    seen: list[str] = []
    whole = load.load_bytes

    def load_bytes(content: bytes, name: str, *more: object, **options: object) -> Topology:
        seen.append(name)
        return whole(content, name, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(load, "load_bytes", load_bytes)
    return seen


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ours.yaml"
    path.write_text(TEXT)
    return path


def test_the_second_time_it_is_recalled_as_it_was(loads: list[str], file: Path) -> None:
    first = load_topology(str(file), ["gpus=3"], trust=False)
    again = load_topology(str(file), ["gpus=3"], trust=True)
    assert loads == [str(file)]
    assert repr(again) == repr(first), "also the order of the nodes"
    assert list(again.nodes) == ["zulu", "alpha"]
    assert again == first


def test_what_is_set_makes_another_one(loads: list[str], file: Path) -> None:
    topologies = [
        load_topology(str(file), settings, kernel=kernel, iommu_mode=mode)
        for settings, kernel, mode in (
            ((), None, None),
            (("gpus=1",), None, None),
            ((), "generic", None),
            ((), None, "off"),
        )
    ]
    assert len(loads) == 4
    assert len({repr(topology) for topology in topologies}) == 4
    assert load_topology(str(file), (), iommu_mode="off") == topologies[3]
    assert len(loads) == 4


def test_an_edited_file_is_read_anew(loads: list[str], file: Path) -> None:
    load_topology(str(file), ())
    times = file.stat()
    file.write_text(TEXT.replace("64M", "32M"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert next(load_topology(str(file), ()).nodes["zulu"].entries()).vram_bytes == 32 << 20  # type: ignore[union-attr]
    assert len(loads) == 2


def test_other_code_reads_it_anew(
    loads: list[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_topology(str(file), ())
    monkeypatch.setattr(remembered, "state_of", lambda folder: [(folder.name, 1, 2)])
    load_topology(str(file), ())
    assert len(loads) == 2


def test_wrong_ones_are_wrong_each_time(loads: list[str], file: Path) -> None:
    file.write_text(TEXT.replace("vram:", "vran:"))
    for _ in range(2):
        with pytest.raises(InputError, match=r"ours\.yaml:\d+:\d+: .*vran"):
            load_topology(str(file), ())
    assert len(loads) == 2


def test_devices_of_the_users_own_are_looked_at_each_time(loads: list[str], file: Path) -> None:
    file.write_text(OWN)
    load_topology(str(file), ())
    with pytest.raises(InputError, match="not trusted"):
        load_topology(str(file), (), trust=False)
    assert len(loads) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"@class": "Nothing"}', '{"@class": "Topology", "rak": "a"}']
)
def test_a_garbled_memory_is_none(loads: list[str], file: Path, tmp_path: Path, text: str) -> None:
    wanted = load_topology(str(file), ())
    (stored,) = (tmp_path / "cache/remembered").iterdir()
    stored.write_text(text)
    assert load_topology(str(file), ()) == wanted
    assert len(loads) == 2


def test_a_pipe_is_read_once(loads: list[str], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(TEXT,), daemon=True)
    writer.start()
    assert load_topology(str(pipe), ()).rack == "ours"
    writer.join(10.0)
    assert not (tmp_path / "cache").exists()


def test_only_so_many_are_kept(
    loads: list[str], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen_topology, "_MOST", 2)
    for gpus in range(4):
        load_topology(str(file), [f"gpus={gpus}"])
    assert len(list((tmp_path / "cache/remembered").iterdir())) == 2
