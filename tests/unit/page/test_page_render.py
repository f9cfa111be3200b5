# SPDX-License-Identifier: Apache-2.0
"""The page as text: all is in it, nothing of a stranger's becomes markup, nothing is unbounded."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import InputError
from testbed.page import render as page
from testbed.page.render import render
from testbed.results.record import DeviceRecord
from testbed.results.verdicts import ConsoleSpan, Outcome, Verdict
from tests.unit.page.run_folder import (
    EVIL,
    MOVED,
    hostile_run,
    large_run,
    report_record,
    run_record,
    topology_data,
    write_run,
)
from tests.unit.results_samples import OUTCOMES

MOST_BYTES = 4 << 20


class Parsed(HTMLParser):
    """What a browser would make of it, as far as these tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = ""
        self.raw: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style"):
            self.raw.setdefault(self.inside, []).append(data)
        else:
            self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_the_page_has_every_part(tmp_path: Path) -> None:
    """Verdict, reason, evidence, fault records, rack, peers, devices, logs, environment."""
    found = Parsed(render(write_run(tmp_path / "run")))
    ids = {attributes.get("id") for _, attributes in found.tags}
    parts = {"requirements", "timeline", "rack", "peers", "devices", "logs", "environment"}
    assert parts <= ids
    for outcome in OUTCOMES:
        assert outcome.test in found.text
        assert outcome.reason in found.text
    for words in ("0000:05:00.1", "0xf4000000", "PTE Read access", "IOVA", "lost faults"):
        assert words in found.text
    assert "Linux" not in found.text or "11.1.2" in found.text
    assert "7.2.12" in found.text
    assert "quad-gpu" in found.text
    assert [title for title in found.texts if title.startswith("FAIL: ")]


def test_what_a_run_shows_of_peers_is_told_apart_from_what_nobody_asked(tmp_path: Path) -> None:
    found = Parsed(render(write_run(tmp_path / "run", run_record([MOVED]))))
    assert "30 pairs, 0 asked of the kernel, 1 measured" in found.text
    assert "no test of this run asked the kernel about this pair" in str(found.tags)


def test_a_failed_move_is_no_unknown(tmp_path: Path) -> None:
    made = run_record([replace(MOVED, verdict=Verdict.FAIL, reason="bytes differ")])
    found = Parsed(render(write_run(tmp_path / "run", made)))
    assert "measured m failed" in found.text
    assert "0 measured" in found.text


def test_nothing_of_a_strangers_becomes_markup(tmp_path: Path) -> None:
    text = render(hostile_run(tmp_path / "run"))
    found = Parsed(text)
    names = {tag for tag, _ in found.tags}
    assert not names & {"img", "iframe", "object", "embed", "base", "link", "form-data"}
    assert len(found.of("script")) == len(found.of("style")) == 1
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert "style" not in attributes
        href = attributes.get("href") or ""
        assert href == "" or href.startswith("#"), href
    assert "7*191" in text
    assert "1337" not in text
    assert "\u202e" not in text
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x9b]", text)
    assert "\\u202e" in text
    for words in EVIL[:2]:
        assert words in found.text


def test_the_policy_allows_this_script_and_this_style_sheet_alone(tmp_path: Path) -> None:
    found = Parsed(render(hostile_run(tmp_path / "run")))
    policy = next(str(each["content"]) for each in found.of("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none';")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        digest = hashlib.sha256("".join(found.raw[tag]).encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy


def test_only_links_to_the_web_lead_out_of_the_page(tmp_path: Path) -> None:
    outcome = Outcome((), "a", Verdict.FAIL, "REPRODUCED: so")
    for link, leads in (
        ("https://example.org/1", True),
        ("http://example.org", True),
        ("javascript:alert(1)", False),
        ("file:///etc/passwd", False),
        ("https:no-host", False),
        ("http://[bad", False),
    ):
        report = replace(report_record(), link=link)
        made = run_record([outcome], reports=[report])
        folder = write_run(tmp_path / link.replace("/", "_"), made)
        found = Parsed(render(folder))
        assert (link in [each.get("href") for each in found.of("a")]) is leads


def test_a_bug_report_is_told_in_its_own_words(tmp_path: Path) -> None:
    outcome = Outcome((), "a", Verdict.FAIL, "REPRODUCED: the IOMMU refuses it")
    found = Parsed(
        render(write_run(tmp_path / "r", run_record([outcome], reports=[report_record()])))
    )
    assert "REPRODUCED: a raw address · testbed" in found.texts
    for words in (
        "a GPU for an accelerator",
        "✓ yes",
        "✗ no",
        "call x",
        "-s exporter",
        "public report",
    ):
        assert words in found.text
    assert "1 FAIL" not in found.text


def test_several_reports_of_one_command_are_one_page(tmp_path: Path) -> None:
    for word in ("REPRODUCED", "FIXED"):
        report = replace(report_record(word), title=f"bug {word}")
        verdict = Verdict.PASS if word == "FIXED" else Verdict.FAIL
        outcome = Outcome((), word.lower(), verdict, f"{word}: so")
        write_run(tmp_path / "runs" / word, run_record([outcome], reports=[report]))
    found = Parsed(render(tmp_path / "runs"))
    assert "MIXED: 2 bug reports · testbed" in found.texts
    assert "bug FIXED" in found.text
    assert "bug REPRODUCED" in found.text
    assert "FIXED/rack/host0" in found.text


def test_several_racks_engines_and_nodes_are_all_there(tmp_path: Path) -> None:
    data = topology_data("two-node-fabric")
    racks = ("igb/rack", "model/rack", "model/rack-scalable")
    folder = write_run(
        tmp_path / "run", run_record(name="two-node-fabric"), racks=racks, topology=data
    )
    found = Parsed(render(folder))
    for rack in racks:
        for node in data["nodes"]:
            assert f"{rack}/{node}" in found.text
    assert len(found.of("svg")) == len(racks) + 1  # and the timeline


def test_each_part_of_a_run_has_its_own_rack_and_devices(tmp_path: Path) -> None:
    parts = {"one": topology_data("quad-gpu"), "two": topology_data("minimal")}
    devices = [
        DeviceRecord(f"{label}/rack", "host0", f"gpu-of-{label}", counters={"iommu": {"reads": 1}})
        for label in parts
    ]
    made = replace(
        run_record([replace(MOVED, test=f"{label}/mapped") for label in parts]),
        topology={},
        topologies=parts,
        devices=tuple(devices),
    )
    write_run(tmp_path / "run", made, racks=())
    for label, topology in parts.items():
        write_run(tmp_path / "run" / label, topology=topology)
    text = render(tmp_path / "run")
    assert "<h1>quad-gpu, minimal</h1>" in text
    assert text.count("gpu-of-one") == text.count("gpu-of-two") == 1
    for label in parts:
        assert f"The topology as resolved of {label}" in text


def test_what_changed_is_in_the_page(tmp_path: Path) -> None:
    before = write_run(tmp_path / "a", run_record([replace(MOVED, verdict=Verdict.FAIL)]))
    after = write_run(tmp_path / "b", run_record([MOVED], kernel="7.3.4"))
    found = Parsed(render(after, against=before))
    assert "1 verdicts changed" in found.text
    assert "fixed" in found.text
    assert "7.3.4" in found.text


def test_the_lines_of_a_test_are_marked_in_the_console(tmp_path: Path) -> None:
    span = ConsoleSpan("rack", "host0", 26, 90)
    outcome = replace(MOVED, started_s=1e9, console=(span,))
    text = render(write_run(tmp_path / "run", run_record([outcome])))
    begin = text.index('class="mark">')
    assert "MAP-03 mapped[gpu0-gpu1]" in text[begin : begin + 200]
    assert "DMAR" in text[begin:]
    assert "testbed: ready" in text[:begin]


def test_calls_stand_with_the_test_that_made_them(tmp_path: Path) -> None:
    outcomes = [
        replace(MOVED, requirements=("A-1",), started_s=1e9),
        replace(MOVED, requirements=("B-1",), started_s=1e9 + 5),
    ]
    calls: list[dict[str, Any]] = [
        {"at_s": 1e9 - 9, "method": "before.all"},
        {"at_s": 1e9 + 1, "method": "first.call", "elapsed_s": 0.5},
        {"at_s": 1e9 + 6, "method": "second.call", "error": {"message": "EINVAL"}},
        {"at_s": "soon", "method": "no.time"},
    ]
    text = render(write_run(tmp_path / "run", run_record(outcomes), calls=calls))
    assert "before.all" not in text
    assert text.index("A-1</h3>") < text.index("first.call") < text.index("B-1</h3>")
    assert text.index("B-1</h3>") < text.index("second.call") < text.index("EINVAL")


def test_links_and_pipes_in_a_run_folder_are_not_followed(tmp_path: Path) -> None:
    """A page is sent on: a stranger's folder must not put the reader's files into it."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "console.log").write_text("the reader's own words\n")
    folder = write_run(tmp_path / "run")
    logs = folder / "rack" / "host0"
    for name in ("console.log", "qemu.log"):
        (logs / name).unlink()
    (logs / "console.log").symlink_to(secret / "console.log")
    os.mkfifo(logs / "qemu.log")
    (folder / "rack" / "host1").symlink_to(secret)
    (folder / "elsewhere").symlink_to(secret)
    text = render(folder)
    assert "the reader's own words" not in text
    assert "reader&#39;s own words" not in text
    assert "host1" not in Parsed(text).text
    (folder / "record.json").rename(secret / "record.json")
    (folder / "record.json").symlink_to(secret / "record.json")
    with pytest.raises(InputError, match="no run folder"):
        render(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"nodes": 1}', b"[" * 100_000, b"\xff" * 100, b"null"],
)
def test_a_rack_that_cannot_be_read_is_said_and_not_drawn(tmp_path: Path, content: bytes) -> None:
    folder = write_run(tmp_path / "run", calls=[])
    (folder / "rack" / "topology.json").write_bytes(content)
    (folder / "rack" / "host0" / "observations.jsonl").write_bytes(content)
    found = Parsed(render(folder))
    assert "It cannot be drawn:" in found.text
    assert "console.log" in found.text


def test_a_large_run_stays_bounded_and_says_what_was_cut(tmp_path: Path) -> None:
    text = render(large_run(tmp_path / "run"))
    assert len(text.encode()) < MOST_BYTES
    found = Parsed(text)
    assert "BIG-499" in found.text
    assert re.search(r"Left out: [\d,]+ bytes in its middle were not read", found.text)
    assert "lines are not in this page" in found.text


def test_all_logs_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_LOGS_BYTES", 600)
    console = b"x" * 50 + b"\n"
    folder = write_run(tmp_path / "run", racks=("rack", "rack-b", "rack-c"), console=console * 40)
    text = render(folder)
    assert text.count("x" * 50) <= 12
    assert "bytes in its middle were not read" in text


def test_racks_without_end_are_not_drawn(tmp_path: Path) -> None:
    """What a stranger can write in a megabyte must not take minutes to lay out."""
    data = topology_data()
    gpu = {"vram": 1 << 20, "engine": "model", "doorbell": False, "faults": []}
    for number in range(24):
        entry = {"root_port": f"many{number}", "acs": "none"}
        data["nodes"]["host0"]["pcie"].append({**entry, "below": [{"gpu": f"g{number}", **gpu}]})
    nodes = {f"node{number}": data["nodes"]["host0"] for number in range(60)}
    large = {**data, "nodes": nodes, "links": []}
    folder = write_run(tmp_path / "run", topology=data, racks=[f"rack-{n}" for n in range(12)])
    (folder / "rack-0" / "topology.json").write_text(json.dumps(large))
    began_s = time.monotonic()
    found = Parsed(render(folder))
    assert time.monotonic() - began_s < 30
    assert "PCI functions, more than 1,500" in found.text
    assert "has more devices than a page has room for pairs" in found.text


def test_a_folder_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder, words in (
        (tmp_path / "missing", "there is no such folder"),
        (tmp_path, "is no run folder"),
    ):
        with pytest.raises(InputError, match=words):
            render(folder)
    (tmp_path / "record.json").write_text('{"schema": "testbed.run/9"}')
    with pytest.raises(InputError, match="not a record of this version"):
        render(tmp_path)


def test_a_huge_record_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "record.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(InputError, match="larger than 64 MiB"):
        render(tmp_path)


def test_an_empty_run_is_a_page_too(tmp_path: Path) -> None:
    found = Parsed(render(write_run(tmp_path / "run", run_record([], code=130), racks=())))
    assert "INTERRUPTED" in found.text
    assert "No test has run." in found.text
