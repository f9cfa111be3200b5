# SPDX-License-Identifier: Apache-2.0
"""Loading: from where, and what of the file survives."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from testbed.errors import ExitCode, InputError
from testbed.topology.document import MOST_FILE_BYTES
from testbed.topology.load import load, load_text
from testbed.topology.model import Gpu, from_data, to_data, with_overrides

SHIPPED = Path(__file__).parents[3] / "topologies"
TEXT = """\
rack: x
vars: {n: 2, size: 1M}
nodes:
  host0:
    pcie:
      {% for i in range(n) %}
      - gpu: gpu{{ i }}
        vram: {{ size }}
      {% endfor %}
"""


def test_settings_change_the_rack_and_are_kept() -> None:
    topology = load_text(TEXT, "x", {"n": "3", "size": "4M"})
    assert dict(topology.vars) == {"n": 3, "size": "4M"}
    gpus = [entry for entry in topology.nodes["host0"].entries() if isinstance(entry, Gpu)]
    assert [gpu.name for gpu in gpus] == ["gpu0", "gpu1", "gpu2"]
    assert {gpu.vram_bytes for gpu in gpus} == {4 << 20}


def test_from_a_file_and_from_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rack.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    expected = load_text(TEXT, "x", {})
    assert load(path, {}) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert load("-", {}) == expected


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_places_do_not_depend_on_how_lines_end(newline: str) -> None:
    text = TEXT.replace("{{ size }}", "{{ size }}0M").replace("\n", newline)
    with pytest.raises(InputError) as caught:
        load_text(text, "x", {})
    assert {(d.line, d.column) for d in caught.value.diagnostics} == {(8, 15)}


def test_a_missing_file_has_a_nearest_one() -> None:
    with pytest.raises(InputError, match=r"no such file.*did you mean 'quad-gpu.yaml'") as caught:
        load(SHIPPED / "quad-gpus.yaml", {})
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_a_folder_and_a_large_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        load(tmp_path, {})
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MOST_FILE_BYTES + 1))
    with pytest.raises(InputError, match="larger than"):
        load(large, {})


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda p: p.stem)
def test_what_is_stored_is_the_same_rack(path: Path) -> None:
    topology = load(path, {})
    stored = json.dumps(to_data(topology))
    assert from_data(json.loads(stored)) == topology
    assert load_text(stored, "stored", {}) == topology


def test_overrides_reach_every_node() -> None:
    topology = load(SHIPPED / "quad-gpu.yaml", {})
    changed = with_overrides(topology, rack="other", iommu_mode="off", kernel="k", cpu="EPYC")
    node = changed.nodes["host0"]
    assert (changed.rack, node.iommu.mode, node.kernel, node.machine.cpu) == (
        "other",
        "off",
        "k",
        "EPYC",
    )
    assert topology.nodes["host0"].iommu.mode == "strict"
    assert with_overrides(topology) == topology


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iommu_mode": "fast"}, "'mode' is 'fast'; expected off, passthrough, lazy or strict"),
        ({"cpu": "a,b"}, "'a,b' is not a CPU model"),
        ({"rack": "../x"}, "'../x' is not a name"),
    ],
)
def test_a_wrong_override_is_bad_input(change: dict[str, str], words: str) -> None:
    topology = load(SHIPPED / "minimal.yaml", {})
    with pytest.raises(InputError) as caught:
        with_overrides(topology, **change)
    assert words in str(caught.value)


def test_a_mode_for_a_node_without_iommu_is_bad_input() -> None:
    topology = load_text("rack: x\nnodes: {a: {iommu: {kind: none}}}\n", "x", {})
    with pytest.raises(InputError, match="mode 'strict' needs an IOMMU"):
        with_overrides(topology, iommu_mode="strict")
