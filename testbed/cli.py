# SPDX-License-Identifier: Apache-2.0
"""The command's first and last moments; what lies between is the verbs'.

Results go to stdout and everything else to stderr; errors are one message, an optional hint and
the exit code of :mod:`testbed.errors`. What a rack's start can begin without knowing which is begun
before anything else is even imported.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys

from testbed import interrupts
from testbed.machine import early

TYPE_CHECKING = False  # typing's, without the rest of it
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

# A verb makes far more objects than it drops: looked for so often, garbage takes a tenth of the
# processor time of its imports. With this figure imports alone (80,000 objects) look for none.
GARBAGE_AFTER = 200_000  # objects; Python's own figure is 700

# Verbs that start a rack, unless one of these words follows: then its keeper starts at once.
_STARTING = ("up", "run")
_NOT_STARTING = frozenset(("-h", "--help", "--rack", "--list", "-j", "--jobs"))

_OURS = ("testbed", "guest_agent")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and end the process with its exit code."""
    interrupts.heed()
    debug = "--debug" in (sys.argv if arguments is None else arguments) or bool(
        os.environ.get("TESTBED_DEBUG")
    )
    gc.set_threshold(GARBAGE_AFTER, *gc.get_threshold()[1:])
    code = _run(arguments, debug)
    gc.freeze()  # the interpreter would search all of it, twice, just before the kernel takes it
    sys.exit(code)


def _begin(words: Sequence[str]) -> None:
    """Start what can be started before the words are understood."""
    if words[:1] and words[0] in _STARTING and _NOT_STARTING.isdisjoint(words):
        early.begin(several=words[0] == "run")
        if words[0] == "up" and "--warm" in words:
            from testbed.machine import ahead  # noqa: PLC0415  slow

            atexit.register(ahead.end)
            ahead.begin(words)


def _run(arguments: Sequence[str] | None, debug: bool) -> int:
    try:
        _begin(sys.argv[1:] if arguments is None else arguments)
        from testbed.verbs.group import cli  # noqa: PLC0415  slow

        answer: Any = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="testbed",
            standalone_mode=False,
        )
    except BaseException as error:
        return _answer(error, debug)
    return int(answer) if isinstance(answer, int) else 0


def _answer(error: BaseException, debug: bool) -> int:
    """Say what ended the verb, and with which exit code the process ends."""
    import click  # noqa: PLC0415  slow

    from testbed.errors import ExitCode, Interrupted, TestbedError  # noqa: PLC0415  likewise

    if debug and not isinstance(error, click.exceptions.Exit | click.ClickException):
        raise error
    code: int = ExitCode.ERROR
    match error:
        case click.exceptions.Exit():
            code = error.exit_code
        case click.ClickException():
            error.show()
            code = ExitCode.BAD_INPUT
        case KeyboardInterrupt() | click.Abort() | Interrupted():
            click.echo("testbed: interrupted", err=True)
            code = ExitCode.INTERRUPTED
        case BrokenPipeError() | SystemExit():
            # The reader of our output went away (click makes a SystemExit of that, and no verb
            # raises one); there is nobody to tell, and Python's own flush at exit must not
            # complain either. The code is the shell's for SIGPIPE: a run that was not heard to
            # its end did not PASS.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 128 + signal.SIGPIPE
        case TestbedError():
            click.echo(f"testbed: {error}", err=True)
            if error.hint:
                click.echo(f"hint: {error.hint}", err=True)
            code = error.exit_code
        case ModuleNotFoundError(name=str(name)) if not name.startswith(_OURS):
            click.echo(
                f"testbed: the Python package of '{name}' is missing\n"
                "hint: `./bootstrap --version`, or `pip install -e .`, installs what is needed",
                err=True,
            )
        case _:
            click.echo(
                f"testbed: ERROR, the testbed's own fault: {type(error).__name__}: {error}\n"
                "hint: run it again with `testbed --debug …` and send what it prints",
                err=True,
            )
    return code


if __name__ == "__main__":
    main()
