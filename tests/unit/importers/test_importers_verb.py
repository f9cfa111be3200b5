# SPDX-License-Identifier: Apache-2.0
"""`testbed import` as a user meets it, and real machines' files where there are any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.topology import load
from testbed.topology.importers import FORMATS, source
from testbed.topology.importers.convert import READERS, Options, convert
from testbed.topology.placement import place

ROOT = Path(__file__).parents[3]
DATA = ROOT / "tests" / "data" / "import"
NVSWITCH = DATA / "nvswitch.nccl.xml"
CORPUS = os.environ.get("TESTBED_CORPUS", "")
CORPUS_FILES = sorted(Path(CORPUS).glob("*/*.xml")) if CORPUS else []


def run(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "testbed.cli", "import", *words],
        input=stdin,
        capture_output=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode(), result.stderr.decode()
    )


def test_every_format_has_a_reader() -> None:
    assert tuple(READERS) == FORMATS


def test_the_topology_is_all_that_is_on_stdout() -> None:
    result = run("nccl", str(NVSWITCH))
    assert result.returncode == 0
    assert load.load_text(result.stdout, "stdout", {}).rack == "nvswitch"
    assert "testbed: not known: ACS of 3 switches: -s switch_acs=redirect|none" in result.stderr
    assert "#   * ACS of 3 switches" in result.stdout


def test_a_file_is_written_and_stdin_is_read(tmp_path: Path) -> None:
    target = tmp_path / "rack.yaml"
    result = run("nccl", "-", "-o", str(target), "--rack", "mine", stdin=NVSWITCH.read_bytes())
    assert (result.returncode, result.stdout) == (0, "")
    assert load.load(target, {}).rack == "mine"


def test_json_has_the_notes_and_the_origins() -> None:
    document = json.loads(run("nccl", str(NVSWITCH), "--format", "json").stdout)
    assert document["format"] == "testbed.import/1"
    assert document["devices"]["gpu0"] == "0000:13:00.0"
    assert document["folded"] == ["1 other host of 2"]
    assert load.load_text(document["topology"], "json", {})


def test_options_reach_the_topology(tmp_path: Path) -> None:
    words = ("--keep", "gpu", "--vram", "1G", "-s", "iommu_mode=lazy", "--around", "gpu0")
    result = run("nccl", str(NVSWITCH), *words)
    topology = load.load_text(result.stdout, "stdout", {})
    (node,) = topology.nodes.values()
    assert node.iommu.mode == "lazy"
    assert [e.name for e in node.entries() if e.kind == "gpu"] == ["gpu0"]
    assert not [e for e in node.entries() if e.kind == "nic"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nccl", "missing.xml"), "missing.xml: no such file or directory"),
        (("nccl", "tests/data/import"), "tests/data/import: is a directory"),
        (("hwloc", str(NVSWITCH)), "1:1: <system> is not hwloc's topology"),
        (("nccl", str(NVSWITCH), "--keep", "gpus"), "'gpus' is no kind of device"),
        (("nccl", str(NVSWITCH), "--as", "x"), "--as: 'x' has no '='"),
        (("nccl", str(NVSWITCH), "--vram", "3M"), "--vram: '3M' is not a power of two"),
        (("nccl", str(NVSWITCH), "--rack", "1"), "--rack: '1' is not a name"),
        (("nccl", str(NVSWITCH), "-s", "switch_asc=none"), "did you mean 'switch_acs'?"),
        (("nccl", str(NVSWITCH), "-s", "cpu={{x}}"), "-s cpu={{x}}: '((x))' is no plain value"),
        (("nccl", str(NVSWITCH), "-s", "switch_acs=no"), "-s: 'acs' is 'no'; expected redirect"),
        (("nccl", str(NVSWITCH), "-o", "/nowhere/x"), "/nowhere/x: no such file or directory"),
        (("lspcii", str(NVSWITCH)), "'lspcii' is not one of"),
    ],
)
def test_wrong_input_is_one_error_and_nothing_is_written(
    words: tuple[str, ...], message: str
) -> None:
    result = run(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_is_too_large_is_not_read_whole() -> None:
    result = run("lspci", "/dev/zero")
    assert result.returncode == 2
    assert f"/dev/zero: larger than {source.MOST_FILE_BYTES >> 20} MiB" in result.stderr


@pytest.mark.skipif(not CORPUS_FILES, reason="TESTBED_CORPUS names no folder of real files")
@pytest.mark.parametrize("path", CORPUS_FILES, ids=lambda path: path.name)
def test_real_files_become_racks(path: Path) -> None:
    result = convert(path.parent.name, str(path), Options())
    place(load.load_text(result.text, "again", {}))
    assert set(result.origins) or any("the file has none" in n for n in result.notes.unknown)


@pytest.mark.parametrize(
    ("path", "gpus", "links"),
    [
        ("nccl/p4d-24xl-topo.xml", 8, 0),
        ("nccl/g5.48xl-topo.xml", 9, 0),
        ("hwloc/24em64t-2n6c2t-pci.xml", 3, 0),
        ("hwloc/power8gpudistances.xml", 4, 2),
        ("hwloc/nvidia-dgx-gb10.xml", 0, 0),
    ],
)
def test_real_files_keep_their_gpus(path: str, gpus: int, links: int) -> None:
    if not CORPUS or not (Path(CORPUS) / path).exists():
        pytest.skip("TESTBED_CORPUS has not this file")
    result = convert(path.partition("/")[0], str(Path(CORPUS) / path), Options())
    assert sum(name.startswith("gpu") for name in result.origins) == gpus
    assert len(result.topology.links) == links
