# SPDX-License-Identifier: Apache-2.0
"""The command line: which verbs there are, and what every verb shares.

A verb is imported when it is used, so that `testbed --version` and shell completion stay quick.
Results go to stdout and everything else to stderr; errors are one message, an optional hint and
the exit code of :mod:`testbed.errors`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import keyword
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from testbed import __version__
from testbed.errors import ExitCode, Interrupted, TestbedError
from testbed.machine import early

# A verb makes far more objects than it drops: looked for so often, garbage takes a tenth of the
# processor time of its imports.
GARBAGE_AFTER = 50_000  # objects; Python's own figure is 700

# Verbs that start a rack, unless one of these words follows: then its keeper starts at once.
_STARTING = ("up", "run")
_NOT_STARTING = frozenset(("-h", "--help", "--rack", "--list", "-j", "--jobs"))

# verb → (module of testbed.verbs, section of the help)
VERBS = {
    "run": ("run", "Judge"),
    "matrix": ("matrix", "Judge"),
    "repro": ("repro", "Judge"),
    "bundle": ("bundle", "Judge"),
    "page": ("page", "Read runs"),
    "diff": ("page", "Read runs"),
    "history": ("history", "Read runs"),
    "trace": ("trace", "Read runs"),
    "up": ("racks", "Racks"),
    "down": ("racks", "Racks"),
    "ps": ("racks", "Racks"),
    "inspect": ("racks", "Racks"),
    "topo": ("peers", "Racks"),
    "ssh": ("reach", "Reach into a rack"),
    "console": ("reach", "Reach into a rack"),
    "qmp": ("reach", "Reach into a rack"),
    "logs": ("reach", "Reach into a rack"),
    "devices": ("devices", "Model devices"),
    "witness": ("devices", "Model devices"),
    "inject": ("devices", "Model devices"),
    "faultlat": ("faultlat", "Model devices"),
    "validate": ("topology", "Topologies"),
    "plan": ("topology", "Topologies"),
    "graph": ("peers", "Topologies"),
    "schema": ("topology", "Topologies"),
    "import": ("importing", "Topologies"),
    "doctor": ("host", "This machine"),
    "setup": ("host", "This machine"),
    "kernel": ("kernel", "This machine"),
    "bench": ("bench", "This machine"),
    "cache": ("cache", "This machine"),
    "completion": ("host", "This machine"),
}


class VerbGroup(click.Group):
    """Verbs by name, imported on use, listed by section."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's interface)
        """All verbs, in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The verb, or None; click then names the nearest."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"testbed.verbs.{VERBS[cmd_name][0]}")
        # A verb that is a word of Python's own has a function with a '_' after it.
        attribute = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command: click.Command = getattr(module, attribute)
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                # Named after the option as the user knows it, not after our variable.
                longest = max(parameter.opts, key=len).lstrip("-").replace("-", "_")
                parameter.envvar = f"TESTBED_{cmd_name}_{longest}".upper()
                parameter.show_envvar = True
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest verb in the message."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            import difflib  # noqa: PLC0415  (only on this error path)

            near = difflib.get_close_matches(args[0], VERBS, 1)
            ctx.fail(
                f"there is no verb '{args[0]}'" + (f"; did you mean '{near[0]}'?" if near else "")
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One list a section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for verb, (_, section) in VERBS.items():
            command = self.get_command(ctx, verb)
            if command is not None:
                sections.setdefault(section, []).append((verb, command.get_short_help_str(70)))
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows)


@click.group(
    cls=VerbGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="testbed")
@click.option(
    "--debug",
    is_flag=True,
    envvar="TESTBED_DEBUG",
    show_envvar=True,
    help="Show the Python traceback of an error.",
)
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """One YAML file becomes a multi-GPU rack of QEMU machines in which peer-to-peer DMA
    really happens, is really translated by a vIOMMU, and is really judged.

    Exit codes: 0 PASS, 1 FAIL, 2 bad input, 3 LOST (a machine or link died), 125 nothing could
    be judged (SKIP), 128 ERROR (the testbed's own fault), 130 Ctrl-C. They suit `git bisect run`.
    """
    ctx.obj = {"debug": debug}


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and end the process with its exit code."""
    # Asked to end, by whichever signal: unwind, so that racks and files go away.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
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
        early.begin()
        if words[0] == "up" and "--warm" in words:
            from testbed.machine import ahead  # noqa: PLC0415  slow

            atexit.register(ahead.end)
            ahead.begin(words)


def _run(arguments: Sequence[str] | None, debug: bool) -> int:
    try:
        _begin(sys.argv[1:] if arguments is None else arguments)
        answer: Any = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="testbed",
            standalone_mode=False,
        )
    except BaseException as error:
        if debug and not isinstance(error, click.exceptions.Exit | click.ClickException):
            raise
        return _answer(error)
    return int(answer) if isinstance(answer, int) else ExitCode.PASS


def _answer(error: BaseException) -> int:
    """Say what ended the verb, and with which exit code the process ends."""
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
        case _:
            click.echo(
                f"testbed: ERROR, the testbed's own fault: {type(error).__name__}: {error}\n"
                "hint: run it again with `testbed --debug …` and send what it prints",
                err=True,
            )
    return code


if __name__ == "__main__":
    main()
