# SPDX-License-Identifier: Apache-2.0
"""Our own commands as a user starts them: a process each, from exec to what it says or to its end.

They share the user's cache, and nothing else: racks, runs and history are in a folder that goes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import HostError
from testbed.results.record import FILE_NAME, RunRecord, load_record

TIMEOUT_S = 300.0
STARTS = "starting "  # what `up` says on stderr before it does
HELLO = "all agents answered"  # and when that has happened
_LAST_WORDS = 400


@dataclass(frozen=True)
class Ran:
    """A command that has ended.

    ``seconds``    from exec to its end; ``cpu_s`` what it and all that it waited for used.
    ``said_s``     from exec to the line of stderr that was waited for; to the end if none was.
    """

    seconds: float
    cpu_s: float
    exit_code: int
    stdout: bytes
    stderr: str
    said_s: float


class Commands:
    """Runs them, in a temporary folder of its own.

    Racks that were left running end with it, and nothing of theirs is kept.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        # Short: socket paths have at most 107 bytes.
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-")))
        runtime = self.folder / "r"
        runtime.mkdir(mode=0o700)
        self._environment = {
            **os.environ,
            "TESTBED_RUNTIME_DIR": str(runtime),
            "TESTBED_STATE_DIR": str(self.folder / "s"),
            "PYTHONUNBUFFERED": "1",  # a line of stderr is seen when it is said
        }
        program = Path(sys.executable).with_name("testbed")
        self._program = (
            [str(program)] if program.exists() else [sys.executable, "-m", "testbed.cli"]
        )

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack, suppress(HostError):
            self.run(["down", "--all", "--now"])

    def run(
        self,
        words: Sequence[str],
        *,
        until: str = "",
        good: Iterable[int] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Ran:
        """``testbed WORDS``.

        :param until: also say when this was first said on stderr.
        :param good: the exit codes that are no error; None: any.
        :raises HostError: another exit code, no such line, or not within ``timeout_s``.
        """
        name = f"testbed {' '.join(words[:4])}"
        with tempfile.TemporaryFile() as stdout:
            began_s = time.monotonic()
            lines, said_s = [], 0.0
            with subprocess.Popen(
                [*self._program, *words],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                env=self._environment,
            ) as process:
                late = threading.Timer(timeout_s, process.kill)  # its racks die with it
                late.start()
                try:
                    for line in process.stderr or ():
                        if until and not said_s and until.encode() in line:
                            said_s = time.monotonic() - began_s
                        lines.append(line)
                    _, status, used = os.wait4(process.pid, 0)
                    process.returncode = os.waitstatus_to_exitcode(status)
                    seconds = time.monotonic() - began_s
                except BaseException:
                    process.kill()
                    raise
                finally:
                    overdue = not late.is_alive()
                    late.cancel()
            stdout.seek(0)
            said = stdout.read()
        stderr = b"".join(lines).decode(errors="replace")
        if overdue:
            raise HostError(f"{name}: did not end within {timeout_s:.0f} s")
        if good is not None and process.returncode not in tuple(good):
            why = stderr.strip()[-_LAST_WORDS:]
            raise HostError(f"{name}: ended with {process.returncode}: {why}")
        if until and not said_s:
            raise HostError(f"{name}: never said '{until}'")
        cpu_s = used.ru_utime + used.ru_stime
        return Ran(seconds, cpu_s, process.returncode, said, stderr, said_s or seconds)

    def judged(
        self, words: Sequence[str], *, good: Iterable[int] = (0,), timeout_s: float = TIMEOUT_S
    ) -> tuple[Ran, RunRecord]:
        """``testbed run WORDS``, and its record.

        :raises HostError: as :meth:`run`, or it left no record.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            ran = self.run(["run", *words, "--output", output], good=good, timeout_s=timeout_s)
            path = Path(output) / FILE_NAME
            if not path.exists():
                raise HostError(f"testbed run {' '.join(words[:3])}: left no record")
            return ran, load_record(path)
