# SPDX-License-Identifier: Apache-2.0
"""Someone's own tests, run on a fake rack."""

from __future__ import annotations

import io
import itertools
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console

from testbed.harness.runner import Choice, RunResult, run_suites
from testbed.results.verdicts import Outcome, Verdict
from tests.contract.fake_rack import FakeSource, quad_gpu

OWN_TESTS = """
    import pytest
    from testbed.errors import CapabilityMissing
    from testbed.results.judging import Judgement

    def call(rack, method="system.info"):
        return rack.nodes["host0"].agent.call(method)
"""


_numbers = itertools.count()


class Run:
    """A module of tests, run on a fake rack."""

    def __init__(self, tmp_path: Path, body: str, *knobs: dict[str, Any], **choice: Any) -> None:
        # pytest imports test files by their base names: each needs one of its own.
        module = tmp_path / f"test_{next(_numbers)}_own.py"
        module.write_text(textwrap.dedent(OWN_TESTS) + textwrap.dedent(body))
        self.source = FakeSource(quad_gpu(), tmp_path, *knobs)
        self.stream = io.StringIO()
        self.result: RunResult = run_suites(
            Choice([str(module)], **choice),
            self.source,
            tmp_path,
            stream=self.stream,
            console=Console(file=io.StringIO()),
        )

    @property
    def outcomes(self) -> dict[str, Outcome]:
        return {outcome.test: outcome for outcome in self.result.record.outcomes}

    @property
    def verdicts(self) -> list[Verdict]:
        return [outcome.verdict for outcome in self.result.record.outcomes]
