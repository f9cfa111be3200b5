# SPDX-License-Identifier: Apache-2.0
"""What several verbs share: options, the chosen topology, JSON on stdout."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from testbed.chosen_topology import find_topology as find_topology  # noqa: PLC0414
from testbed.chosen_topology import load_topology as load_topology  # noqa: PLC0414
from testbed.chosen_topology import parse_settings as parse_settings  # noqa: PLC0414
from testbed.errors import InputError
from testbed.topology.engines import ENGINES

F = TypeVar("F", bound=Callable[..., Any])


IOMMU_MODES = ("off", "passthrough", "lazy", "strict")


def format_option(*choices: str, default: str | None = "text") -> Callable[[F], F]:
    """`--format`, with what this verb can print."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(choices),
        default=default,
        show_default=default is not None,
        help="What to print on stdout.",
    )


def settings_option(function: F) -> F:
    """`-s name=value`, the topology's own variables."""
    return click.option(
        "-s",
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="Set one of the topology's vars; may be given several times.",
    )(function)


def engine_option(*more: str) -> Callable[[F], F]:
    """`--engine`, over what the topology says; ``more`` words for verbs that know them."""
    return click.option(
        "--engine",
        type=click.Choice([*ENGINES, *more]),
        help="The copy engine of every GPU and NIC, over the topology's."
        + (" `all`: one after the other, and compare what they say." if "all" in more else ""),
    )


def trust_option(function: F) -> F:
    """`--trust`, for verbs that start a rack."""
    return click.option(
        "--trust",
        is_flag=True,
        help="Run the Python files that the topology names as devices (`device:`).",
    )(function)


def warm_option(function: F) -> F:
    """`--warm`, for verbs that start a rack."""
    return click.option(
        "--warm",
        is_flag=True,
        help="Restore each machine, booted once and saved (`testbed cache`), instead of booting.",
    )(function)


def override_options(function: F) -> F:
    """`--kernel` (with `--modules`, or as `--kernel-tree`) and `--iommu`, over the topology's.

    The verb gets the parameters ``kernel``, as in a topology, and ``iommu_mode``.
    """

    @functools.wraps(function)
    def verb(
        *args: Any, kernel: str | None, modules: str | None, kernel_tree: str | None, **more: Any
    ) -> Any:
        return function(*args, kernel=kernel_word(kernel, modules, kernel_tree), **more)

    options = (
        click.option(
            "--kernel",
            metavar="NAME|PATH",
            help="The guest kernel of every node: a name (`testbed kernel list`), a bzImage, a "
            "vmlinux, or a folder that has one.",
        ),
        click.option(
            "--modules",
            metavar="DIR",
            help="The modules of the kernel at --kernel PATH, where they are not beside it.",
        ),
        click.option(
            "--kernel-tree",
            metavar="DIR",
            help="A built kernel tree: its image, its modules, and modules of ours built in it.",
        ),
        click.option(
            "--iommu",
            "iommu_mode",
            type=click.Choice(IOMMU_MODES),
            help="The IOMMU's mode on every node, over the topology's.",
        ),
    )
    decorated: Any = verb
    for option in reversed(options):
        decorated = option(decorated)
    return cast(F, decorated)


def kernel_word(kernel: str | None, modules: str | None, tree: str | None) -> str | None:
    """The three options as one word, as a topology's ``kernel`` has it; None if none is given.

    Paths become absolute: the word is kept with the rack, and later commands run elsewhere.

    :raises InputError: they contradict one another, or the tree was not built.
    """
    if kernel is None and modules is None and tree is None:
        return None  # nothing to import for
    from testbed.host import kbuild
    from testbed.host import kernel as kernels

    if tree is not None:
        if kernel is not None or modules is not None:
            raise InputError(
                "--kernel-tree goes with neither --kernel nor --modules",
                hint="the tree has both in it",
            )
        folder = Path(tree).expanduser().absolute()
        kernels.locate(folder)
        kbuild.check_built(folder)
        return str(folder)
    if kernel is not None and "/" in kernel:
        kernel = str(Path(kernel).expanduser().absolute())
    if modules is None:
        return kernel
    if kernel is None or not Path(kernel).exists():
        raise InputError("--modules belongs to a kernel", hint="--kernel PATH --modules DIR")
    image = Path(kernel).absolute()
    return f"{image}{kernels.MODULES}{Path(modules).expanduser().absolute()}"


def print_json(kind: str, body: Mapping[str, Any]) -> None:
    """A versioned JSON document on stdout; ``kind`` is like ``testbed.ps/1``."""
    click.echo(json.dumps({"format": kind, **body}, indent=2, default=str))


def run_folder(output: Path | None, name: str) -> Path:
    """The folder for what a run leaves: the one that was asked for, or a fresh one for ``name``.

    :raises InputError: it cannot be made.
    """
    from testbed.host import paths

    run_dir = output or paths.new_run_dir(name)
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the run folder {run_dir}: {error.strerror}") from error
    return run_dir


def say(text: str) -> None:
    """One line of what is going on, on stderr."""
    click.echo(f"testbed: {text}", err=True)


def rack_argument(*, node: bool = False) -> Callable[[F], F]:
    """`RACK` or `RACK[/NODE]`, completed from the racks that run."""

    def complete(_ctx: click.Context, _parameter: click.Parameter, word: str) -> list[str]:
        from testbed.host import paths
        from testbed.machine import registry

        words: list[str] = []
        for info in registry.list_racks(paths.runtime_dir()):
            words.append(info.name)
            if node and info.record:
                words += [f"{info.name}/{name}" for name in info.record.nodes]
        return [each for each in words if each.startswith(word)]

    return click.argument(
        "rack", metavar="RACK[/NODE]" if node else "RACK", shell_complete=complete
    )
