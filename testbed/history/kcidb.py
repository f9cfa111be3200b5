# SPDX-License-Identifier: Apache-2.0
"""The history as KCIDB JSON, the kernel community's format for test reports. Pure.

Schema version 5.3, as published by kernelci.org (package ``kcidb-io``, which the tests validate
with; it is not needed to write). LOST and DIFFERENT become ERROR, which there means that the state
of the tested code is not known; our ERROR becomes MISS, a failure of the harness.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from testbed.history.model import Remembered, RunLine

MAJOR, MINOR = 5, 3
ORIGIN = re.compile(r"[a-z0-9_]+")

_STATUS = {
    "PASS": "PASS",
    "FIXED": "PASS",
    "FAIL": "FAIL",
    "REPRODUCED": "FAIL",
    "SKIP": "SKIP",
    "LOST": "ERROR",
    "DIFFERENT": "ERROR",
    "ERROR": "MISS",
}


def document(remembered: Iterable[Remembered], origin: str) -> dict[str, Any]:
    """The report: a checkout and a build for each kernel, a test for each result.

    :param origin: who submits: lower-case letters, digits, ``_``.
    """
    checkouts: dict[str, dict[str, Any]] = {}
    builds: dict[str, dict[str, Any]] = {}
    tests: dict[str, dict[str, Any]] = {}
    for each in remembered:
        run, result = each.run, each.result
        kernel = _clean(run.build_id or run.kernel or "unknown")
        checkout, build = f"{origin}:{kernel}", f"{origin}:{kernel}-x86_64"
        checkouts.setdefault(checkout, _checkout(checkout, origin, run))
        builds.setdefault(build, _build(build, checkout, origin, run))
        number = f"{origin}:{run.key}-{_clean(result.name)}"
        tests[number] = {
            "id": number,
            "origin": origin,
            "build_id": build,
            "path": f"testbed.{_path(result.name)}",
            "comment": _clean(f"{result.name}: {result.reason}"),
            "status": _STATUS.get(result.verdict, "ERROR"),
            "start_time": run.started,
            "duration": result.duration_s,
            "environment": {
                "comment": _clean(f"testbed rack {run.topology}, {run.iommu} IOMMU"),
                "misc": {
                    "qemu": run.qemu,
                    "accelerator": run.accelerator,
                    "topology": run.topology,
                    "iommu": run.iommu,
                    "setting": run.setting,
                },
            },
            "misc": {"testbed_verdict": result.verdict, "testbed_version": run.tool_version},
        }
    return {
        "version": {"major": MAJOR, "minor": MINOR},
        "checkouts": list(checkouts.values()),
        "builds": list(builds.values()),
        "tests": list(tests.values()),
    }


def _checkout(number: str, origin: str, run: RunLine) -> dict[str, Any]:
    """What is known of a kernel's source is its release; no commit is made up."""
    return {
        "id": number,
        "origin": origin,
        "comment": _clean(f"Linux {run.kernel}"),
        "valid": True,
    }


def _build(number: str, checkout: str, origin: str, run: RunLine) -> dict[str, Any]:
    return {
        "id": number,
        "origin": origin,
        "checkout_id": checkout,
        "architecture": "x86_64",
        "comment": _clean(f"Linux {run.kernel}"),
        "status": "PASS",
        "misc": {"build_id": run.build_id},
    }


def _path(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "test"


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
