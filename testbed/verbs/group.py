# SPDX-License-Identifier: Apache-2.0
"""Which verbs there are, and what every verb shares.

A verb is imported when it is used, so that `testbed --version` and shell completion stay quick.
"""

from __future__ import annotations

import importlib
import keyword

import click

from testbed import __version__

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
            import difflib

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
