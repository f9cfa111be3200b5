# SPDX-License-Identifier: Apache-2.0
"""A stranger's bundle before it is replayed, and the words for a replay when it is over."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.bundle import archive, collect, compare, manifest, show
from testbed.bundle.compare import Here
from testbed.bundle.tell import Told, Wanted, tell
from testbed.errors import CapabilityMissing, InputError
from testbed.reports.judge import Word
from testbed.reports.load import Overrides
from testbed.results import options, record
from testbed.results.options import RunOptions
from testbed.results.verdicts import Outcome, Verdict
from testbed.topology.model import to_data
from tests.unit.bundle.run_folders import make_run
from tests.unit.reports.report_text import TEXT, case_of
from tests.unit.results_samples import sample_record

TOPOLOGY = to_data(case_of().topology)


@pytest.fixture(autouse=True, scope="module")
def _no_page() -> Iterator[None]:
    """The page takes longest, and is no part of a replay."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(collect, "render", lambda _: "")
        yield


def told(folder: Path, wanted: Wanted | None = None, *, name: str = "x.zip") -> Told:
    bundle = archive.parse(name, collect.bundle(folder)[1])
    return tell(bundle, wanted or Wanted({}, Overrides()))


def changed(**node: Any) -> dict[str, Any]:
    data = copy.deepcopy(TOPOLOGY)
    data["nodes"]["host0"].update(node)
    return data


def with_entry(entry: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(TOPOLOGY)
    data["nodes"]["host0"]["pcie"].append(entry)
    return data


def run_of(folder: Path, topology: dict[str, Any], *, report: bool = False) -> Path:
    make_run(folder, report=report)
    record_file = folder / "record.json"
    written = record.load_record(record_file)
    record.write_record(dataclasses.replace(written, topology=topology), record_file)
    return folder


def test_a_report_is_replayed_as_it_was_resolved(tmp_path: Path) -> None:
    topology = changed(kernel_args=["quiet"])
    found = told(run_of(tmp_path / "1", topology, report=True))
    assert found.case is not None
    assert found.word == "REPRODUCED"
    assert found.case.variables == {"raw": True}
    assert to_data(found.topology) == topology
    assert found.case.name == "x"


def test_settings_read_a_report_anew_with_what_the_command_line_had_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "1", report=True)
    options.write_options(RunOptions("repro", iommu_mode="strict"), folder)
    wanted = Wanted({"raw": "false"}, Overrides())
    found = told(folder, wanted)
    assert found.case is not None
    assert found.case.variables == {"raw": False}
    assert found.topology.nodes["host0"].iommu.mode == "strict"
    found = told(folder, Wanted({"raw": "false"}, Overrides(iommu_mode="lazy")))
    assert found.topology.nodes["host0"].iommu.mode == "lazy"
    with pytest.raises(InputError, match="did you mean 'raw'"):
        told(folder, Wanted({"rav": "false"}, Overrides()))


@pytest.mark.parametrize("report", [False, True])
def test_a_stranger_uses_nothing_of_this_host(tmp_path: Path, report: bool) -> None:
    strange = {
        "the kernel '/boot/vmlinuz' is a path": changed(kernel="/boot/vmlinuz"),
        "'card' is a real device": with_entry({"passthrough": "card", "host": "0000:01:00.0"}),
        "--trust": with_entry({"device": "own", "model": "/tmp/own.py:Card"}),
    }
    for number, (said, topology) in enumerate(strange.items()):
        folder = run_of(tmp_path / str(number), topology, report=report)
        with pytest.raises(InputError, match=said):
            told(folder)
    trusted = Wanted({}, Overrides(), trust=True)
    assert told(tmp_path / "0", trusted).topology.nodes["host0"].kernel == "/boot/vmlinuz"
    with pytest.raises(InputError, match=r"own\.py"):
        told(tmp_path / "2", trusted)  # code is in no bundle


@pytest.mark.parametrize(
    "topology",
    [{}, {"rack": "x"}, {"rack": "x", "nodes": 1}, {"rack": "x", "nodes": {"a": 1}}, changed(k=1)],
)
@pytest.mark.parametrize("report", [False, True])
def test_a_wrong_topology_is_an_error(
    tmp_path: Path, topology: dict[str, Any], report: bool
) -> None:
    with pytest.raises(InputError) as caught:
        told(run_of(tmp_path / "1", topology, report=report))
    assert caught.value.diagnostics
    assert all(each.file.startswith("x.zip") for each in caught.value.diagnostics)


def test_a_kernel_of_its_makers_own_has_to_be_given(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "1", changed(kernel="/home/alice/linux"))
    with pytest.raises(InputError, match=r"a kernel of its maker's own: \$HOME/linux") as caught:
        told(folder)
    assert "--kernel-tree" in caught.value.hint
    found = told(folder, Wanted({}, Overrides(kernel="default")))
    assert found.topology.nodes["host0"].kernel == "default"


def test_code_of_its_makers_own_is_not_replayed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "1")
    options.write_options(RunOptions("run", ("./test_mine.py",)), folder)
    with pytest.raises(InputError, match=r"'\./test_mine\.py' is no suite"):
        told(folder)
    options.write_options(RunOptions("run", ("kselftest",)), folder)
    with pytest.raises(CapabilityMissing, match="kselftest"):
        told(folder)
    options.write_options(RunOptions("run"), folder)
    assert told(folder).word == "FAIL"
    with pytest.raises(InputError, match="as resolved"):
        told(folder, Wanted({"gpus": "2"}, Overrides()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}", "another version"),
        (b"[" * 100_000, "is no JSON"),
        (b"x", "is no JSON"),
        (b'{"schema": "testbed.options/1", "verb": 1}', "verb: "),
        (b'{"schema": "testbed.options/1", "verb": "run", "more": 1}', "more: "),
    ],
)
def test_wrong_options_are_an_error(content: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        options.read_options("x", content)


def test_a_report_of_several_or_none_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "1")
    (folder / "report.yaml").write_text(TEXT)
    with pytest.raises(InputError, match="has 0 reports in its record"):
        told(folder)


def record_of(**verdicts: Verdict) -> record.RunRecord:
    outcomes = tuple(
        Outcome((name.replace("_", "-"),), name, verdict, "r") for name, verdict in verdicts.items()
    )
    return record.make_record(record.RunInfo(), outcomes, duration_s=0)


P, F, S, L, E = (Verdict(word) for word in ("PASS", "FAIL", "SKIP", "LOST", "ERROR"))

WORDS = [
    (({"A": P, "B": P}), ({"A": P, "B": P}), Word.REPRODUCED, 0, 0, 1),
    (({"A": F, "B": P}), ({"A": F, "B": P}), Word.REPRODUCED, 1, 0, 1),
    (({"A": F, "B": P}), ({"A": P, "B": P}), Word.FIXED, 0, 1, 0),
    (({"A": F, "B": F}), ({"A": P, "B": F}), Word.DIFFERENT, 125, 1, 1),
    (({"A": F, "B": P}), ({"A": P, "B": F}), Word.DIFFERENT, 125, 1, 1),
    (({"A": F, "B": P}), ({"A": S, "B": P}), Word.DIFFERENT, 125, 1, 1),
    (({"A": P}), ({"A": F}), Word.DIFFERENT, 125, 1, 1),
    (({"A": P}), ({"A": P, "B": P}), Word.DIFFERENT, 125, 1, 1),
    (({"A": F, "B": P}), ({"A": P}), Word.DIFFERENT, 125, 1, 1),
    (({"A": F}), ({"A": S}), Word.SKIP, 125, 125, 125),
    (({"A": F, "B": P}), ({"A": P, "B": L}), Word.LOST, 125, 3, 3),
    (({"A": L}), ({"A": L}), Word.REPRODUCED, 1, 0, 1),
    (({"A": P}), ({"A": E}), Word.ERROR, 128, 128, 128),
]


@pytest.mark.parametrize(("there", "here", "word", "code", "reproduced", "fixed"), WORDS)
def test_the_word_for_two_runs(
    there: dict[str, Verdict],
    here: dict[str, Verdict],
    word: Word,
    code: int,
    reproduced: int,
    fixed: int,
) -> None:
    first, second = record_of(**there), record_of(**here)
    found, reason = compare.word_of(first, second)
    assert found is word, reason
    assert compare.code_of(found, first, None) == code
    assert compare.code_of(found, first, Word.REPRODUCED) == reproduced
    assert compare.code_of(found, first, Word.FIXED) == fixed
    assert len(compare.changes(first, second)) == sum(
        there.get(name) != here.get(name) for name in {*there, *here}
    )


def test_what_differs_of_the_machine_is_listed() -> None:
    versions = {
        "qemu": "11.1.2",
        "accelerator": "tcg",
        "kernels": {"default": {"release": "7.2.12", "build_id": "ab" * 20}},
        "packages": {"guest": [{"name": "libc6", "version": "1"}, {"name": "x", "version": "1"}]},
    }
    there = dataclasses.replace(
        sample_record(), versions=versions, topology=TOPOLOGY, host={"processor": "a"}
    )
    same = Here(there.tool_version, versions, {"processor": "a"}, TOPOLOGY)
    assert compare.environment(there, same) == ()
    topology = changed(iommu={"kind": "intel", "mode": "passthrough"})
    topology["nodes"]["host0"]["machine"]["cpu"] = "EPYC"
    here = Here(
        "9",
        {
            **versions,
            "accelerator": "kvm",
            "kernels": {"/linux": {"release": "7.4.0", "build_id": "cd" * 20}},
            "packages": {"guest": [{"name": "libc6", "version": "2"}]},
        },
        {"processor": "b"},
        topology,
    )
    said = "\n".join(map(str, compare.environment(there, here)))
    for words in (
        "testbed: ",
        "accelerator: tcg there, kvm here",
        "kernel: 7.2.12 (abababababababab) there, 7.4.0 (cdcdcdcdcdcdcdcd) here",
        "packages of guest: libc6 1 there, libc6 2, and 1 more here",
        "IOMMU nodes.host0.iommu.mode: ",
        "CPU model nodes.host0.machine.cpu: max there, EPYC here",
        "host's processor: a there, b here",
    ):
        assert words in said, words
    nonsense = dataclasses.replace(
        there, versions={"kernels": 1, "packages": [1], "qemu": []}, topology={"nodes": [1]}
    )
    assert compare.environment(nonsense, same)


def test_command_lines_are_compared_word_by_word() -> None:
    def commands(*argv: str) -> list[dict[str, Any]]:
        return [
            {"name": "host0.models", "node": "host0", "argv": ["python"]},
            {"node": "host0", "argv": list(argv)},
        ]

    there = commands("qemu", "-m", "1G", "$RUNTIME/racks/quad/host0/initrd.img")
    here = commands("qemu", "-m", "2G", "$RUNTIME/racks/quad-2/host0/initrd.img")
    assert compare.command_lines(there, here) == ["-host0: 1G", "+host0: 2G"]
    assert compare.command_lines(there, there) == []
    wrong: list[Any] = [{}, [1], [{"argv": 1}], None]
    for nonsense in wrong:
        compare.command_lines(nonsense, here)


JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1 << 70,
        0.5,
        "",
        "x",
        "$HOME",
        "\x1b[2J\n",
        "../x",
        "/etc/passwd",
        "{{ 1 }}",
    ),
    *([], {}, [1], [[[]]], {"": 0}, {"a": {"b": []}}, ["x"] * 300, "PASS", "${a.b}", "default"),
)


@pytest.fixture(scope="module", params=["report", "run"])
def honest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_run(tmp_path_factory.mktemp("run") / "1", report=request.param == "report")
    bundle = archive.parse("x.zip", collect.bundle(folder)[1])

    def members() -> dict[str, bytes]:  # a function, as Hypothesis prints arguments
        return dict(bundle.members)

    return members


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(each, (*path, key))


def spoilt(data: Any, choose: random.Random) -> Any:
    """The value with something else somewhere in it, or something missing."""
    path = choose.choice(list(places_in(data)))
    junk = copy.deepcopy(choose.choice(JUNK))
    if not path:
        return junk
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if choose.random() < 0.6:
        inner[path[-1]] = junk
    else:
        del inner[path[-1]]
    return data


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_a_bundle_that_lies_is_an_error_and_never_a_crash(honest: Any, seed: int) -> None:
    """Rightly made of spoilt parts: what is read of it, shown and replayed."""
    choose = random.Random(seed)  # noqa: S311  a test's choice
    members = honest()
    name = choose.choice(["record.json", "record.json", "options.json", "report.yaml"])
    if name == "report.yaml":
        lines = members.get(name, b"").decode().splitlines() or [""]
        lines[choose.randrange(len(lines))] = str(choose.choice(JUNK))
        members[name] = "\n".join(lines).encode("utf-8", "replace")
    else:
        data = json.loads(members[name])
        for _ in range(choose.randint(1, 3)):
            data = spoilt(data, choose)
        members[name] = json.dumps(data).encode()
    kind = choose.choice(["report", "run"])
    listed = manifest.make(members, tool_version="0", kind=kind)
    bundle = archive.parse("x.zip", archive.write(listed, members))
    with contextlib.suppress(InputError):
        assert all(line.isprintable() for line in show.lines(bundle))
        json.dumps(show.data(bundle), default=str)
    with contextlib.suppress(InputError, CapabilityMissing):
        found = tell(bundle, Wanted({}, Overrides()))
        here = Here("0", {}, {}, to_data(found.topology))
        assert "\n" not in "".join(map(str, compare.environment(found.record, here)))
        assert found.word
