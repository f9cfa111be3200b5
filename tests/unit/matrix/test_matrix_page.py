# SPDX-License-Identifier: Apache-2.0
"""A matrix's page: each place opens its run's page, and nothing outside of the folder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from click.testing import CliRunner

from testbed.errors import InputError
from testbed.matrix import page
from testbed.matrix.records import MATRIX_FILE, CellRecord, MatrixRecord, to_json
from testbed.results.record import write_atomically
from testbed.results.verdicts import Verdict
from testbed.verbs.page import page as verb
from tests.unit.page.run_folder import EVIL, write_run

LINK = re.compile(r'href="([^"]*)"')


def cell(number: int, verdict: Verdict, suite: str = "p2p-iommu", **more: object) -> CellRecord:
    name = f"{number}-quad-gpu-gpus=2-{suite}"
    values = {"topology": "quad-gpu gpus=2", "suite": suite}
    made = CellRecord(name, "k", values, verdict, reason=f"why {number}", attempts=1)
    return replace(made, **{"folder": f"cells/{name}/1", **more})  # type: ignore[arg-type]


def matrix(*cells: CellRecord, **more: object) -> MatrixRecord:
    made = MatrixRecord(
        "m", "m.matrix.yaml", "", ("topology", "suite"), cells, "2026-07-01T12:00:00", 1.0, 1
    )
    return replace(made, **more)  # type: ignore[arg-type]


def links(text: str) -> set[str]:
    return {unquote(link) for link in LINK.findall(text)} - {"#main"}


def test_each_place_opens_its_runs_page_or_what_was_left(tmp_path: Path) -> None:
    passed, lost = cell(1, Verdict.PASS), cell(2, Verdict.LOST, "p2p-kernel")
    skipped = cell(3, Verdict.SKIP, "empty", folder="")
    write_run(tmp_path / passed.folder / "run")
    assert page.write_cell_page(tmp_path / passed.folder / "run") == ""
    (tmp_path / lost.folder / "run").mkdir(parents=True)
    text = page.to_html(matrix(passed, lost, skipped), tmp_path)
    assert links(text) == {
        f"{passed.folder}/run/page.html",
        *(f"{each.folder}/" for each in (passed, lost)),
        f"#{skipped.name}",
    }
    assert "why 2" in text
    assert "why 3" in text


def test_of_repetitions_the_worst_is_opened(tmp_path: Path) -> None:
    every = [cell(1, Verdict.PASS), cell(2, Verdict.FAIL), cell(3, Verdict.FAIL)]
    text = page.to_html(matrix(*every), tmp_path)
    place = text[text.index("<tbody>") : text.index("</tbody>")]
    assert "FAIL 2/3" in place
    assert links(place) == {f"{every[1].folder}/"}


@pytest.mark.parametrize("folder", ["/etc", "../..", "cells/../1", "javascript:x", *EVIL])
def test_a_strangers_record_leads_nowhere_else(tmp_path: Path, folder: str) -> None:
    evil = " ".join(EVIL)
    made = cell(1, Verdict.FAIL, folder=folder, where=evil, reason=evil, name=evil)
    text = page.to_html(matrix(made, description=evil, matrix=evil, host={evil: evil}), tmp_path)
    assert all(link.startswith("#") for link in links(text))
    assert "<script" not in text
    assert "<img" not in text
    assert "script-src &#39;none&#39;" in text


def test_it_is_made_again_with_the_pages_of_its_cells(tmp_path: Path) -> None:
    whole, broken = cell(1, Verdict.PASS), cell(2, Verdict.FAIL)
    for each in (whole, broken):
        write_run(tmp_path / each.folder / "run")
    (tmp_path / broken.folder / "run" / "record.json").write_text("{}")
    write_atomically(tmp_path / MATRIX_FILE, to_json(matrix(whole, broken)))
    done = CliRunner().invoke(verb, [str(tmp_path)], catch_exceptions=False)
    assert done.output.splitlines()[-1] == str(tmp_path / "index.html")
    assert f"no page of {broken.name}: InputError" in done.output
    assert f"{whole.folder}/run/page.html" in links((tmp_path / "index.html").read_text())
    done = CliRunner().invoke(verb, [str(tmp_path), "--against", str(tmp_path)])
    assert isinstance(done.exception, InputError)
    (tmp_path / MATRIX_FILE).unlink()
    done = CliRunner().invoke(verb, [str(tmp_path)])
    assert "has not ended" in str(done.exception)
