# SPDX-License-Identifier: Apache-2.0
"""Run folders and bundles for tests, made without a machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from testbed.bundle import archive, manifest
from testbed.results import options, record
from testbed.results.options import RunOptions
from testbed.results.report_record import ReportRecord
from testbed.topology.model import to_data
from tests.unit.reports.report_text import TEXT, case_of
from tests.unit.results_samples import sample_record

HOME = "/home/alice"
PLACES = {
    "RUN": f"{HOME}/runs/1",
    "CACHE": f"{HOME}/.cache/testbed",
    "TESTBED": "/srv/src/testbed",
    "CWD": "/tmp",
    "HOME": HOME,
}
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\\nMTIzNDU2\\n-----END OPENSSH PRIVATE KEY-----"


def make_run(folder: Path, *, report: bool = False, **changes: Any) -> Path:
    """A run's folder as a run leaves it; ``changes`` to its record."""
    rack = folder / "rack"
    (rack / "host0").mkdir(parents=True)
    topology = to_data(case_of().topology)
    reports = (
        (ReportRecord("x.report.yaml", "t", "l", "REPRODUCED", "r", variables={"raw": True}),)
        if report
        else ()
    )
    written = dataclasses.replace(
        sample_record(),
        topology=topology,
        reports=reports,
        command=(f"{HOME}/venv/bin/testbed", "run", "--output", f"{HOME}/runs/1"),
        **changes,
    )
    record.write_record(written, folder / record.FILE_NAME)
    options.write_options(RunOptions("repro" if report else "run"), folder)
    (folder / "places.json").write_text(json.dumps(PLACES))
    (folder / "junit.xml").write_text("<testsuites/>\n")
    (folder / "pytest.log").write_text(f"rootdir: ../..{HOME}/runs/1\n  /srv/src/testbed/a.py:1\n")
    (rack / "topology.json").write_text(json.dumps(topology))
    argv = [f"{HOME}/.cache/testbed/packages/0/root/usr/bin/qemu", "-m", "1G"]
    (rack / "commands.json").write_text(json.dumps([{"node": "host0", "argv": argv}]))
    (rack / "config-1fe9968467f27552").write_text("CONFIG_PCI_P2PDMA=y\n")
    (rack / "host0" / "console.log").write_text("line\n" * 300_000)
    (rack / "host0" / "observations.jsonl").write_text(f'{{"key":"{KEY}"}}\n')
    (rack / "host0" / "core").write_bytes(b"\x7fELF")
    if report:
        (folder / "report.yaml").write_text(TEXT)
    return folder


MEMBERS = {"a.txt": b"a\n", "record.json": b"{}\n", "rack/host0/console.log": b"line\n" * 50}


def make_bundle(**members: bytes) -> bytes:
    """A bundle with these few members."""
    chosen = dict(MEMBERS) | members
    listed = manifest.make(chosen, tool_version="0", kind="run")
    return archive.write(listed, chosen)
