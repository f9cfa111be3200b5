# SPDX-License-Identifier: Apache-2.0
"""Reports are read like topologies: every fault at its place, all at once, nothing of the host."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from testbed.errors import InputError
from testbed.reports.load import Overrides, find_reports, load, load_bytes, shipped_reports
from testbed.reports.model import MOST_STEPS
from tests.unit.reports.report_text import TEXT, case_of, edited

SHIPPED = shipped_reports()
FIRST = "  - open: [gpu0, gpu1]\n"

# An edit of the text, and what is said about it: place, fault, expectation, nearest word.
WRONG = {
    "unknown step": (
        ("  - map: gpu0.vram\n", "  - mpa: gpu0.vram\n"),
        ["x.report.yaml:23:5: an entry without a kind ('mpa' is none)", "did you mean 'map'?"],
    ),
    "unknown key of a step": (
        ("    seed: 1\n", "    sed: 1\n"),
        [":18:5: unknown key 'sed'", "did you mean 'seed'?", "fill 'gpu0.vram' lacks 'seed'"],
    ),
    "no title": (('title: "a raw address"\n', ""), ["the report lacks 'title'"]),
    "wrong type": (("    size: 64\n", "    size: many\n"), [":31:11:", "'many' is not a size"]),
    "too much": (("    size: 64\n", "    size: 2M\n"), ["2M is too much", "at most 1M"]),
    "no link": (("https://example.org/1", "ftp://x"), [":2:7: 'ftp://x' is not a link"]),
    "unknown step name": (
        ("${peer.dma_address}", "${pear.dma_address}"),
        [":30:9: no step is called 'pear'", "did you mean 'peer'?"],
    ),
    "self reference": (
        ("${source.dma_address}", "${dma.bytes}"),
        [":29:11: 'dma' is this step itself; expected an earlier step"],
    ),
    "a later step": (
        ("${source.dma_address}", "${arrived.guest}"),
        ["'arrived' is step 7, which comes later"],
    ),
    "unknown field": (
        ("${peer.dma_address}", "${peer.dma_adress}"),
        ["'peer' has no 'dma_adress'", "did you mean 'dma_address'?"],
    ),
    "no reference": (("${peer.dma_address}", "${peer.dma_address*2}"), ["is not an address"]),
    "step of another kind": (
        ("bytes: arrived\n      are: before", "bytes: dma\n      are: before"),
        ["'dma' is a step 'copy'; expected a step 'checksum'"],
    ),
    "condition's unknown step": (("fault: dma", "fault: dna"), ["did you mean 'dma'?"]),
    "unknown condition": (("no_fault: dma", "nofault: dma"), ["did you mean 'no_fault'?"]),
    "neither are nor are_not": (("      are: sent\n", ""), ["which bytes?"]),
    "unknown device": (("[gpu0, gpu1]", "[gpu0, gpu2]"), ["no device 'gpu2'", "'gpu1'"]),
    "port": (("[gpu0, gpu1]", "[gpu0, gpu1, rp0]"), ["'rp0' is a port"]),
    "not open": (("[gpu0, gpu1]", "[gpu1]"), ["'gpu0.vram' is not open"]),
    "opened twice": (("[gpu0, gpu1]", "[gpu0, gpu1, gpu0]"), ["'gpu0' is open already"]),
    "no engine": (("copy: gpu0", "copy: disk"), ["'disk' has no engine; expected a GPU or a NIC"]),
    "unknown memory": (("map: gpu0.vram", "map: gpu0.vran"), ["did you mean 'gpu0.vram'?"]),
    "name twice": (("as: before", "as: sent"), ["an earlier step is called 'sent' already"]),
    "name of a device": (("as: before", "as: gpu1"), ["'gpu1' is a device of the rack"]),
    "unknown expectation": (
        ("    as: dma\n", "    as: dma\n    expect: {complete: true}\n"),
        ["step 'copy' does not see 'complete'", "did you mean 'completed'?"],
    ),
    "a page": (("map: gpu1.vram\n", "map: gpu1.vram\n    offset: 5\n"), ["is not a page"]),
    "disk's size": ((FIRST, FIRST + "  - {fill: disk, seed: 1}\n"), ["'size: 8K'"]),
    "no model": (
        (FIRST, FIRST + "  - {inject: gpu0, rule: drop write}\n"),
        ["'gpu0' is no model"],
    ),
    "no acs": ((FIRST, FIRST + "  - {acs: disk, redirect: true}\n"), ["no port with ACS"]),
    "misaligned": ((FIRST, FIRST + "  - {config: gpu0, offset: 2}\n"), ["no multiple of 'width'"]),
    "node": ((FIRST, FIRST + "  - {exec: ls, node: host1}\n"), ["'host0'"]),
    "shell": ((FIRST, FIRST + "  - exec: echo ${HOME}\n"), ["in a shell, $NAME"]),
    "wait": ((FIRST, FIRST + "  - wait: 100000\n"), ["at most 60"]),
    "deadline": ((FIRST, FIRST + "  - {exec: ls, timeout: 9999}\n"), ["at most 120"]),
    "settings of an inline topology": (("vars:", "set: {a: 1}\nvars:"), ["no settings of its own"]),
    "topology's own fault": (("vram: 2M", "vram: 3M"), [":11:37:", "not a power of two"]),
    "environment": (("vars:", "environment: {engine: fast}\nvars:"), ["model, igb or edu"]),
    "unknown variable": (("{{ raw }}", "{{ rav }}"), ["did you mean 'raw'?"]),
    "loop bomb": (
        (FIRST, "{% for i in range(10**9) %}\n  - wait: 1\n{% endfor %}\n" + FIRST),
        ["template:"],
    ),
    "too many steps": (
        (FIRST, "{% for i in range(300) %}\n  - wait: 1\n{% endfor %}\n" + FIRST),
        [f"at most {MOST_STEPS}"],
    ),
    "a tag": (("title: ", "title: !!python/name:os.system "), ["is not allowed"]),
    "dies when fixed": (("no_fault: dma", 'lost: "panic"'), ["is not fixed"]),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_what_is_wrong_is_said_where_it_stands(name: str) -> None:
    edit, said = WRONG[name]
    with pytest.raises(InputError) as caught:
        case_of(edited(edit))
    assert caught.value.exit_code == 2
    assert caught.value.diagnostics
    assert all(each.file == "x.report.yaml" and each.line for each in caught.value.diagnostics)
    for words in said:
        assert words in str(caught.value)


def test_a_right_report_is_a_case() -> None:
    case = case_of()
    assert [step.kind for step in case.report.steps][:2] == ["open", "fill"]
    assert case.variables == {"raw": True}
    assert case.name == "x"
    assert case.topology.rack == "two"


def test_all_faults_of_a_stage_come_at_once() -> None:
    text = edited(("map: gpu0.vram", "mpa: gpu0.vram"), ("seed: 2", "seed: 999"), ("https", "ftp"))
    with pytest.raises(InputError) as caught:
        case_of(text)
    assert [each.line for each in caught.value.diagnostics] == [2, 21, 23]
    text = edited(("${peer.dma_address}", "${pear.x}"), ("[gpu0, gpu1]", "[gpu0, gpu2]"))
    with pytest.raises(InputError) as caught:
        case_of(text)
    assert len(caught.value.diagnostics) >= 3


def test_a_call_whose_faults_nobody_watches_shows_none() -> None:
    call = "  - {call: p2p.router, as: asked}\n  - checksum"
    text = edited(("  - checksum", call), ("no_fault: dma", "no_fault: asked"))
    with pytest.raises(InputError, match="nobody watches for faults of 'asked'"):
        case_of(text)
    assert case_of(text.replace("as: asked", "as: asked, watch: true"))


def test_memory_of_a_device_that_is_not_open_is_read_by_pages() -> None:
    text = (
        edited(
            ("[gpu0, gpu1]", "[gpu0]"),
            ("  - map: gpu1.vram\n    raw: {{ raw }}\n    as: peer\n", ""),
        )
        .replace("peer.bus_address", "source.bus_address")
        .replace("peer.", "source.")
    )
    with pytest.raises(InputError, match=r"'gpu1.vram' is not open"):
        case_of(text)
    assert case_of(text.replace("checksum: gpu1.vram\n    size: 64", "checksum: gpu1.vram"))


def test_settings_change_its_variables() -> None:
    case = case_of(settings={"raw": "false"})
    assert case.variables == {"raw": False}
    with pytest.raises(InputError, match=r"has no variable 'rav'.*did you mean 'raw'"):
        case_of(settings={"rav": "true"})


def test_the_environment_is_put_in_and_the_command_line_wins() -> None:
    text = edited(
        ("vars:", "environment: {iommu_mode: lazy, cpu: EPYC, kernel_args: [quiet]}\nvars:")
    )
    node = case_of(text).topology.nodes["host0"]
    assert (node.iommu.mode, node.machine.cpu, node.kernel_args) == ("lazy", "EPYC", ("quiet",))
    node = case_of(text, overrides=Overrides(iommu_mode="off")).topology.nodes["host0"]
    assert node.iommu.mode == "off"
    text = edited(("vars:", "environment: {iommu_kind: none}\nvars:"))
    assert case_of(text).topology.nodes["host0"].iommu.mode == "off"


def named(word: str) -> str:
    start, rest = TEXT.split("topology:\n", 1)
    return f"{start}topology: {word}\nsteps:" + rest.split("steps:", 1)[1]


def test_a_topology_may_be_a_shipped_one_or_stand_beside_the_report(tmp_path: Path) -> None:
    case = case_of(named("minimal\nset: {vram: 2M}"))
    assert case.topology.rack == "minimal"
    inner = TEXT.split("topology:\n", 1)[1].split("steps:", 1)[0]
    (tmp_path / "mine.yaml").write_text(inner)
    assert case_of(named("mine.yaml"), tmp_path).topology.rack == "two"
    with pytest.raises(InputError, match=r"no topology 'minimla'.*did you mean 'minimal'"):
        case_of(named("minimla"))
    with pytest.raises(InputError, match=r"x.report.yaml:5:.*'vran'.*did you mean 'vram'"):
        case_of(named("minimal\nset: {vran: 2M}"))


def test_a_strangers_report_reaches_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    (tmp_path / "secret.yaml").write_text("rack: x\nnodes: {a: {}}\n")
    (folder / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    for word in ("../secret.yaml", str(tmp_path / "secret.yaml"), "link.yaml"):
        with pytest.raises(InputError, match="outside of the report's folder"):
            case_of(named(word), folder)
    strange = {
        "environment: {kernel: /boot/vmlinuz}\nvars:": "a path on this host",
        "environment: {kernel: ../bzImage}\nvars:": "a path on this host",
        "environment: {qemu: /bin/sh}\nvars:": "a program on this host",
    }
    for words, said in strange.items():
        text = edited(("vars:", words))
        with pytest.raises(InputError, match=said):
            case_of(text, folder)
        assert case_of(text, folder, trust=True)
    for entry, said in (
        ("{passthrough: card, host: '0000:01:00.0'}", "a real device of this host"),
        ("{device: card, model: card.py:Card}", "--trust"),
    ):
        with pytest.raises(InputError, match=said):
            case_of(edited(("        - {nvme: disk, size: 16M, cmb: 1M}", f"        - {entry}")))
    inner = edited(("      machine:", "      kernel: /boot/x\n      machine:"))
    with pytest.raises(InputError, match="a path on this host"):
        case_of(inner, folder)


@pytest.mark.parametrize(
    "content", [b"", b"- a\n", b"\xff", b"x" * (2 << 20), b"a: &a [*a]\n", b"title: [\n"]
)
def test_what_is_no_report_is_refused(content: bytes) -> None:
    with pytest.raises(InputError):
        load_bytes(content, "x", {}, folder=Path())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_broken_report_is_an_error_and_never_a_crash(data: st.DataObject) -> None:
    lines = data.draw(st.sampled_from([TEXT, *(p.read_text() for p in SHIPPED.values())])).split(
        "\n"
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        match data.draw(st.sampled_from(["drop", "twice", "cut", "swap", "indent", "noise"])):
            case "drop":
                del lines[at]
            case "twice":
                lines.insert(at, lines[at])
            case "cut":
                lines[at] = lines[at][: len(lines[at]) // 2]
            case "swap":
                other = data.draw(st.integers(0, len(lines) - 1))
                lines[at], lines[other] = lines[other], lines[at]
            case "indent":
                lines[at] = " " + lines[at]
            case "noise":
                lines[at] += data.draw(st.text(max_size=8))
        lines = lines or [""]
    with contextlib.suppress(InputError):
        load_bytes("\n".join(lines).encode("utf-8", "replace"), "x", {}, folder=Path())


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_reports_say_where_they_come_from(name: str) -> None:
    report = load(SHIPPED[name], {}).report
    assert report.link.startswith("https://")
    assert report.stand_ins
    assert report.description
    manual = (Path(__file__).resolve().parents[3] / "docs" / "reports.md").read_text()
    assert f"| `{name}` | `-" in manual


def test_words_of_the_command_line_are_files_folders_or_shipped_names(tmp_path: Path) -> None:
    assert find_reports("habanalabs-v3") == [SHIPPED["habanalabs-v3"]]
    assert find_reports(str(SHIPPED["habanalabs-v3"].parent)) == list(SHIPPED.values())
    with pytest.raises(InputError, match="did you mean 'habanalabs-v3'"):
        find_reports("habanalabs")
    with pytest.raises(InputError, match="in this folder"):
        find_reports(str(tmp_path))
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.report.yaml", {})
