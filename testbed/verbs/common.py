# SPDX-License-Identifier: Apache-2.0
"""What several verbs share: options, topology loading, JSON on stdout."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from testbed.errors import Diagnostic, InputError

if TYPE_CHECKING:
    from testbed.topology.model import Topology

F = TypeVar("F", bound=Callable[..., Any])

ENGINES = ("model", "igb", "edu")
IOMMU_MODES = ("off", "passthrough", "lazy", "strict")


def format_option(*choices: str, default: str = "text") -> Callable[[F], F]:
    """`--format`, with what this verb can print."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(choices),
        default=default,
        show_default=True,
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


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """``["gpus=8"]`` → ``{"gpus": "8"}``.

    :raises InputError: a word without ``=``.
    """
    settings: dict[str, str] = {}
    wrong: list[Diagnostic] = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            wrong.append(Diagnostic("-s", 0, 0, f"'{pair}' has no '='", expected="NAME=VALUE"))
        settings[name.strip()] = value
    if wrong:
        raise InputError(diagnostics=wrong)
    return settings


def shipped_topologies() -> dict[str, Path]:
    """The topologies that come with the testbed, by name."""
    from testbed.host import paths

    return {path.stem: path for path in sorted(paths.data_dir("topologies").glob("*.yaml"))}


def find_topology(word: str) -> str | Path:
    """A file as given, ``-`` for stdin, or a shipped topology by its name.

    :raises InputError: neither a file nor such a name.
    """
    if word == "-" or Path(word).exists() or "/" in word or word.endswith((".yaml", ".yml")):
        return word
    shipped = shipped_topologies()
    if word not in shipped:
        from testbed.topology.problem import listing, nearest

        expected = f"a file, or {listing(shipped)}"
        raise InputError(
            diagnostics=[
                Diagnostic(word, 0, 0, "no such topology", expected, nearest(word, shipped))
            ]
        )
    return shipped[word]


def load_topology(
    word: str,
    settings: Sequence[str],
    *,
    kernel: str | None = None,
    iommu_mode: str | None = None,
    engine: str | None = None,
    trust: bool | None = None,
) -> Topology:
    """The topology that the user named, with what the command line changes in it.

    :param trust: whether the files that it names as devices may be run; None if nothing is started.
    :raises InputError: all that is wrong with it.
    """
    from testbed.topology import load, model

    admit = None
    if trust is not None:
        from testbed.machine import own_devices

        admit = own_devices.admission(trust=trust)
    topology = load.load(find_topology(word), parse_settings(settings), admit=admit)
    if (kernel, iommu_mode, engine) != (None, None, None):
        topology = model.with_overrides(
            topology, kernel=kernel, iommu_mode=iommu_mode, engine=engine
        )
    return topology


def print_json(kind: str, body: Mapping[str, Any]) -> None:
    """A versioned JSON document on stdout; ``kind`` is like ``testbed.ps/1``."""
    click.echo(json.dumps({"format": kind, **body}, indent=2, default=str))


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
