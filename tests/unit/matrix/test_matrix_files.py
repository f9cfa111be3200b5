# SPDX-License-Identifier: Apache-2.0
"""Matrix files: what they mean, and what is said where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from testbed.errors import InputError
from testbed.matrix import load
from testbed.matrix.cells import Cell
from testbed.matrix.reference import json_schema, markdown
from testbed.verbs.matrix import matrix as verb

ROOT = Path(__file__).parents[3]


def cells(folder: Path, text: str, **settings: str) -> tuple[Cell, ...]:
    path = folder / "m.matrix.yaml"
    path.write_text(text)
    (folder / "test_mine.py").write_text("")
    return load.load(path, settings).cells


def refused(folder: Path, text: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        cells(folder, text)
    return [str(each).removeprefix(f"{folder}/") for each in caught.value.diagnostics]


def test_the_product_less_exclusions_and_inclusions_last(tmp_path: Path) -> None:
    text = """\
matrix: m
topologies: [minimal, quad-gpu gpus=2]
iommus: [intel strict, amd strict, none]
suites: [p2p-iommu, empty]
exclude:
  - {iommu: amd*, suite: empty}
  - {iommu: none, topology: quad*, reason: nobody has one}
include:
  - {topology: dgx-8gpu, suite: p2p-kernel}
  - {topology: minimal, iommu: none, suite: empty}
"""
    found = cells(tmp_path, text)
    assert [
        (c.values["topology"], c.values["iommu"], c.values["suite"], c.skip) for c in found
    ] == [
        ("minimal", "intel strict", "p2p-iommu", ""),
        ("minimal", "intel strict", "empty", ""),
        ("minimal", "amd strict", "p2p-iommu", ""),
        ("minimal", "none", "p2p-iommu", ""),
        ("minimal", "none", "empty", ""),
        ("quad-gpu gpus=2", "intel strict", "p2p-iommu", ""),
        ("quad-gpu gpus=2", "intel strict", "empty", ""),
        ("quad-gpu gpus=2", "amd strict", "p2p-iommu", ""),
        ("quad-gpu gpus=2", "none", "p2p-iommu", "nobody has one"),
        ("quad-gpu gpus=2", "none", "empty", "nobody has one"),
        ("dgx-8gpu", "", "p2p-kernel", ""),
    ], "an included cell that is there already is not there twice"
    assert len({c.key for c in found}) == len({c.name for c in found}) == len(found)


def test_every_axis_reaches_the_rack(tmp_path: Path) -> None:
    text = """\
matrix: m
kernels: [generic]
qemus: [/opt/qemu]
topologies: [quad-gpu gpus=3]
cpus: [EPYC]
iommus: [intel scalable lazy]
engines: [igb]
"""
    (cell,) = cells(tmp_path, text)
    (node,) = cell.topology["nodes"].values()
    assert node["kernel"] == "generic"
    assert node["machine"]["cpu"] == "EPYC"
    assert node["iommu"] | {"kind": "intel", "mode": "lazy", "scalable": True} == node["iommu"]
    assert str(node["pcie"]).count("'engine': 'igb'") == str(node["pcie"]).count("'engine'")
    assert str(node["pcie"]).count("'gpu'") == 3
    assert cell.qemu == "/opt/qemu"
    assert cell.need.cores == 1
    assert cell.need.memory_bytes > 1 << 30


def test_a_rack_that_cannot_be_is_a_skip_with_the_reason(tmp_path: Path) -> None:
    text = "matrix: m\ntopologies: [minimal]\niommus: [amd scalable, none strict, intel]\n"
    amd, none, intel = cells(tmp_path, text)
    assert "no such rack: kind 'amd' has no scalable mode" in amd.skip
    assert "mode 'strict' needs an IOMMU" in none.skip
    assert not intel.skip


def test_repeated_and_set(tmp_path: Path) -> None:
    text = "matrix: m\nvars: {n: 1}\ntopologies: ['quad-gpu gpus={{ n }}']\nrepeat: 3\n"
    found = cells(tmp_path, text, n="4")
    assert [c.values["topology"] for c in found] == ["quad-gpu gpus=4"] * 3
    assert len({c.key for c in found}) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "matrix: m\ntopologies: [minimal]\nsuite: [empty]\n",
            ["m.matrix.yaml:3:1: unknown key 'suite'; expected matrix, description"],
        ),
        (
            "matrix: m\ntopologies: [minimal]\niommus: [intel, intel strickt]\n",
            ["m.matrix.yaml:3:17: 'strickt' in 'intel strickt' is not an IOMMU", "mean 'strict'?"],
        ),
        (
            "matrix: m\ntopologies: [minimal, quad-gpux]\nsuites: [p2p-iomu]\nkernels: [defalt]\n",
            [
                "m.matrix.yaml:2:23: there is no topology 'quad-gpux'; expected",
                "did you mean 'quad-gpu'?",
                "m.matrix.yaml:3:10: there is no suite 'p2p-iomu'; expected",
                "did you mean 'p2p-iommu'?",
                "m.matrix.yaml:4:11: kernel 'defalt' is no name that is known",
                "did you mean 'default'?",
            ],
        ),
        (
            "matrix: m\ntopologies: [quad-gpu gpu=2]\n",
            ["m.matrix.yaml:2:14:", "has no variable 'gpu'", "did you mean 'gpus'?"],
        ),
        ("matrix: m\ntopologies: [quad-gpu 2]\n", ["'2' is no setting of 'quad-gpu'"]),
        ("matrix: m\n", ["m.matrix.yaml:1:1: the matrix has no cell; expected 'topologies'"]),
        (
            "matrix: m\ntopologies: [minimal]\nexclude: [{suite: p2p-kernel}, {}]\n",
            [
                "m.matrix.yaml:3:19: 'p2p-kernel' is no entry of 'suites'; expected p2p-iommu",
                "m.matrix.yaml:3:32: an empty rule",
            ],
        ),
        ("matrix: m\ntopologies: [minimal]\nrepeat: 10001\n", ["at most 10000"]),
        (
            "matrix: m\ntopologies: [minimal, quad-gpu]\nrepeat: 9000\n",
            ["m.matrix.yaml:3:9: 18000 cells are too many; expected at most 10000"],
        ),
        ("matrix: m\ntopologies: [minimal\n", ["m.matrix.yaml:3:1: not YAML"]),
        ("matrix: m\ntopologies: [minimal]\nqemus: [defaul]\n", ["'defaul' is no path"]),
        ("- 1\n", ["the matrix is a list"]),
        ("matrix: m\ntopologies: [!!python/name:os.system x]\n", ["the tag", "is not allowed"]),
    ],
)
def test_what_is_wrong_is_said_at_its_place(tmp_path: Path, text: str, said: list[str]) -> None:
    lines = "\n".join(refused(tmp_path, text))
    for words in said:
        assert words in lines


def test_a_topologys_own_faults_are_at_their_places_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("rack: x\nnode: {}\n")
    text = "matrix: m\ntopologies: [mine.yaml]\n"
    assert any("mine.yaml:2:1: unknown key 'node'" in line for line in refused(tmp_path, text))


def test_shipped_matrices_can_be_placed() -> None:
    for path in load.shipped_matrices().values():
        plan = load.load(path, {})
        assert plan.cells
        assert not [c.skip for c in plan.cells if c.skip.startswith("no such rack")]


def test_the_reference_and_the_schema_are_the_models() -> None:
    assert (ROOT / "docs" / "matrix-fields.md").read_text() == markdown()
    assert set(json_schema()["properties"]) >= {"matrix", "topologies", "exclude"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cluster", "lokal"], "no cluster"),
        (["--cluster", "local:x"], "'x' is no number of workers"),
        (["--cluster", "http://x"], "no cluster"),
        (["--cluster", "local", "-j", "2"], "-j is for this machine"),
        (["--resume", "x", "--output", "y"], "--resume goes on in its own folder"),
        (["--resume", "nothing"], "no such run"),
    ],
)
def test_words_that_contradict_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setenv("TESTBED_STATE_DIR", str(tmp_path))
    result = CliRunner().invoke(verb, ["iommus", *words])
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)
