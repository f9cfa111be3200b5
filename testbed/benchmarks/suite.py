# SPDX-License-Identifier: Apache-2.0
"""What a suite costs: seconds for each requirement, and processor time by who used it.

Processes are those whose working folder or command line is in the run's own folders, and all that
they started; they are looked at ten times a second, so what a process uses in its last tenth is
missed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed.errors import HostError
from testbed.results.record import FILE_NAME, load_record
from testbed.results.verdicts import Verdict

SUITE_TIMEOUT_S = 1800.0
_LOOK_S = 0.1
_TICKS = os.sysconf("SC_CLK_TCK")
KINDS = ("qemu", "models", "keeper", "harness")


def cost(words: Sequence[str], *, runs: int) -> dict[str, Any]:
    """Run ``testbed run WORDS`` so often; medians are of the run in the middle by its length.

    :raises HostError: it left no record.
    """
    found = sorted((_one(words) for _ in range(runs)), key=lambda each: each["seconds"])
    middle = found[len(found) // 2]
    return {"unit": "s", "words": list(words), "runs": runs, **middle}


def _one(words: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="testbed-bench-") as name:
        folder = Path(name)
        runtime = folder / "r"
        runtime.mkdir(mode=0o700)
        watch = _Watch((str(folder),))
        began_s = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "testbed.cli", "run", *words, "--output", f"{folder}/run"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "TESTBED_RUNTIME_DIR": str(runtime)},
        )
        try:
            with watch:
                _, said = process.communicate(timeout=SUITE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise HostError(f"the suite did not end within {SUITE_TIMEOUT_S:.0f} s") from None
        seconds = time.monotonic() - began_s
        path = folder / "run" / FILE_NAME
        if not path.exists():
            raise HostError(f"the suite left no record: {said.decode()[-500:]}")
        run = load_record(path)
    used = watch.used_s()
    total_s = sum(used.values())
    by_requirement: dict[str, float] = {}
    for outcome in run.outcomes:
        name = " ".join(outcome.requirements) or outcome.test
        by_requirement[name] = round(by_requirement.get(name, 0) + outcome.duration_s, 3)
    return {
        "seconds": round(seconds, 2),
        "exit_code": run.exit_code,
        "not_passed": [
            f"{o.verdict} {o.title}: {o.reason}"
            for o in run.outcomes
            if o.verdict is not Verdict.PASS
        ],
        "tests": len(run.outcomes),
        "cpu_s": {kind: round(used[kind], 2) for kind in KINDS},
        "share": {kind: round(used[kind] / total_s, 3) if total_s else 0 for kind in KINDS},
        "overhead": round(1 - used["qemu"] / total_s, 3) if total_s else 0,
        "requirements_s": dict(sorted(by_requirement.items(), key=lambda item: -item[1])),
    }


@dataclass
class _Watch:
    """Processor time of every process that has one of ``folders`` in it, and of those that such a
    one started, by pid and start.
    """

    folders: tuple[str, ...]
    _members: set[int] = field(default_factory=set)
    _seen: dict[tuple[int, str], tuple[str, float]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> _Watch:
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def used_s(self) -> dict[str, float]:
        """Seconds by kind of process."""
        totals = dict.fromkeys(KINDS, 0.0)
        for kind, used_s in self._seen.values():
            totals[kind] += used_s
        return totals

    def _look_on(self) -> None:
        while not self._stop.wait(_LOOK_S):
            # In order of their numbers: nearly always after who started them.
            for pid in sorted(int(each.name) for each in Path("/proc").glob("[0-9]*")):
                process = Path(f"/proc/{pid}")
                try:
                    self._look(process)
                except (OSError, ValueError, IndexError):
                    continue  # it has ended

    def _look(self, process: Path) -> None:
        pid = int(process.name)
        if pid == os.getpid():
            return
        stat = (process / "stat").read_text().rpartition(")")[2].split()
        key = (pid, stat[19])
        words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        used_s = (int(stat[11]) + int(stat[12])) / _TICKS
        if not words:  # it is ending, and has no memory any more: what it was, it was
            if key in self._seen:
                self._seen[key] = (self._seen[key][0], used_s)
            return
        where = str((process / "cwd").readlink())
        named = any(folder in words or where.startswith(folder) for folder in self.folders)
        if named or int(stat[1]) in self._members:  # a keeper is named by nothing
            self._members.add(pid)
            # Asked each time: between fork and exec it is its parent's.
            self._seen[key] = (_kind(words), used_s)


def _kind(words: str) -> str:
    if "qemu-system" in words:
        return "qemu"
    if "keeper" in words:  # it may be told which models to import
        return "keeper"
    return "models" if "models" in words else "harness"
