# SPDX-License-Identifier: Apache-2.0
"""Programs in the kernel's place: which a checkout has, how they start, what their words mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import InputError
from testbed.machine import argv
from testbed.machine.command import LaunchContext
from testbed.machine.firmware import quick_firmware
from testbed.payload.multiboot import TIMEOUT_S, find_programs
from testbed.results.machine_report import MachineEnd, read_report
from testbed.results.verdicts import Verdict
from testbed.topology import load, placement
from testbed.verbs.payload import PayloadWords
from tests.vm.machine_programs import Program, ended

PASSED, FAILED, ALL_SKIPPED = (MachineEnd(status) for status in (1, 3, 77))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "x86"
    folder.mkdir()
    for name in ("intel-iommu", "apic"):
        (folder / f"{name}.flat").write_bytes(Program().say("PASS: a").then(ended(0)).image())
    (folder / "text.flat").write_text("#!/bin/sh\n" * 9)
    (folder / "apic.c").write_text("int main(void);\n")
    return tmp_path


def test_a_checkout_has_what_was_built(tree: Path) -> None:
    found = find_programs(tree)
    assert [program.name for program in found.programs] == ["intel-iommu"]
    assert found.deadline_s == 4 * TIMEOUT_S
    found = find_programs(tree, ["apic", "intel-iommu", "apic"], 3)
    assert [program.name for program in found.programs] == ["apic", "intel-iommu"]
    assert found.deadline_s == 3


def test_what_is_wrong_is_said_at_once(tree: Path) -> None:
    with pytest.raises(InputError) as caught:
        find_programs(tree, ["intel-iomu", "text"])
    first, second = caught.value.diagnostics
    assert (first.file, first.nearest) == ("--program", "intel-iommu")
    assert "apic, intel-iommu, text" in first.expected
    assert second.file.endswith("x86/text.flat")
    assert second.message == "it has no multiboot header"


def test_a_folder_that_is_none_and_one_that_was_not_built(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkout of kvm-unit-tests"):
        find_programs(tmp_path)
    (tmp_path / "x86").mkdir()
    with pytest.raises(InputError, match="no program was built") as caught:
        find_programs(tmp_path)
    assert "make" in caught.value.hint


@pytest.mark.parametrize(
    ("words", "suites", "said"),
    [
        (PayloadWords(), ["kvm-unit-tests"], "whose kvm-unit-tests"),
        (PayloadWords(tree=Path("/x")), ["p2p-iommu"], "--tree and --program belong to"),
        (PayloadWords(programs=("a",)), [], "--tree and --program belong to"),
        (PayloadWords(collection="a"), ["kvm-unit-tests"], "--collection and --device belong"),
        (PayloadWords(timeout_s=3), ["p2p-iommu"], "--program-timeout belongs to"),
        (PayloadWords(), ["kselftest", "kvm-unit-tests"], "one of them in a run"),
    ],
)
def test_options_that_mean_nothing(words: PayloadWords, suites: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        words.payload(suites, None, None)


def test_the_machine_is_the_racks_but_for_the_kernel() -> None:
    topology = load.load_text("rack: a\nnodes: {host0: {pcie: [{nvme: nvme0}]}}\n", "a.yaml", {})
    plan, node = placement.place(topology).nodes["host0"], topology.nodes["host0"]

    def words(*, program: bool) -> list[str]:
        context = LaunchContext(
            ("qemu",), {}, "tcg", Path("/k"), Path("/i"), "qboot.rom", program=program
        )
        assert bool(quick_firmware(node, context)) is not program, "it wants BARs with addresses"
        return list(argv.command(plan, node, context).argv)

    rack, bare = words(program=False), words(program=True)
    assert bare[-2:] == ["-kernel", "/k"]
    assert "-initrd" not in bare
    assert "-append" not in bare
    kept = rack[: rack.index("-kernel")]
    at = kept.index("-bios")
    assert bare[:-6] == kept[:at] + kept[at + 2 :]
    assert "isa-debug-exit" in bare[-3]


def said(text: str, end: MachineEnd) -> list[tuple[str, Verdict, str]]:
    return [(o.test, o.verdict, o.reason) for o in read_report("p", text, end)]


def test_each_line_is_an_outcome() -> None:
    text = (
        "enabling apic\r\nPASS: a: b\r\nSKIP: c\r\nXFAIL: d\nKFAIL: e\nINFO: f\n"
        "SUMMARY: 4 tests, 2 expected failures, 1 skipped\r\n"
    )
    assert said(text, PASSED) == [
        ("p/a: b", Verdict.PASS, ""),
        ("p/c", Verdict.SKIP, "c"),
        ("p/d", Verdict.SKIP, "XFAIL: d"),
        ("p/e", Verdict.SKIP, "KFAIL: e"),
    ]
    text = "FAIL: a\nXPASS: b\nSUMMARY: 2 tests, 2 unexpected failures\n"
    assert said(text, FAILED) == [
        ("p/a", Verdict.FAIL, "a"),
        ("p/b", Verdict.FAIL, "XPASS: b"),
    ]


@pytest.mark.parametrize(
    ("text", "end", "verdict", "reason"),
    [
        ("PASS: a\n", MachineEnd(None, "it hung"), Verdict.LOST, "it hung"),
        ("PASS: a\n", MachineEnd(0), Verdict.LOST, "status 0"),
        ("PASS: a\n", PASSED, Verdict.LOST, "without a summary"),
        ("PASS: a\nPASS: b\nSUMMARY: 1 tests\n", PASSED, Verdict.LOST, "counts 1 checks"),
        ("PASS: a\nABORT: no\nSUMMARY: 1 tests\n", MachineEnd(255), Verdict.LOST, "ABORT: no"),
        ("Unhandled exception 13 #GP\n", MachineEnd(255), Verdict.LOST, "exception 13"),
        ("PASS: a\nSUMMARY: 1 tests\n", FAILED, Verdict.FAIL, "a check failed"),
        ("FAIL: a\nSUMMARY: 1 tests\n", PASSED, Verdict.ERROR, "contradicts"),
        ("", ALL_SKIPPED, Verdict.SKIP, "skipped everything"),
        ("SUMMARY: 0 tests\n", PASSED, Verdict.PASS, ""),
    ],
)
def test_what_concerns_the_program(
    text: str, end: MachineEnd, verdict: Verdict, reason: str
) -> None:
    *_, (name, got, why) = said(text, end)
    assert (name, got) == ("p", verdict)
    assert reason in why


@given(st.text(), st.one_of(st.none(), st.integers(0, 255)))
def test_no_words_are_too_strange(text: str, status: int | None) -> None:
    assert read_report("p", text, MachineEnd(status, "why"))
