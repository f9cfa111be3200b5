# SPDX-License-Identifier: Apache-2.0
"""The verb that makes a topology of what people know of a real machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.errors import Diagnostic, InputError
from testbed.topology.importers import DEFAULT_MOST, FORMATS
from testbed.verbs.common import format_option, parse_settings, print_json, say, settings_option

if TYPE_CHECKING:
    from testbed.topology.fields import Size, Text
    from testbed.topology.importers.convert import Imported
    from testbed.topology.importers.machine import Kind

AS_FOUND = "as-found"


@click.command("import")
@click.argument("source_format", metavar="FORMAT", type=click.Choice(FORMATS))
@click.argument("file")
@click.option(
    "--keep",
    default="gpu,nic,nvme",
    show_default=True,
    metavar="KIND,…",
    help="Which devices to keep, the most important first: gpu, nic, nvme, other.",
)
@click.option(
    "--around",
    default="",
    metavar="DEVICE,…",
    help="Only what is below the same root ports as these: addresses, labels, or new names.",
)
@click.option(
    "--most",
    type=click.IntRange(min=0),
    default=DEFAULT_MOST,
    show_default=True,
    metavar="NUMBER",
    help="How many devices at most; the less important ones are folded.",
)
@click.option(
    "--as",
    "kinds",
    multiple=True,
    metavar="DEVICE=KIND",
    help="What a device is, where the file does not say or says otherwise; may be repeated.",
)
@click.option(
    "--vram",
    default="64M",
    show_default=True,
    metavar=f"SIZE|{AS_FOUND}",
    help=f"The GPUs' memory; {AS_FOUND}: as the file says, halved until it fits.",
)
@click.option("--rack", default="", metavar="NAME", help="The rack's name; by default the file's.")
@settings_option
@click.option("-o", "--output", metavar="FILE", help="Write the topology here, not to stdout.")
@format_option("yaml", "json", default="yaml")
def import_(
    source_format: str,
    file: str,
    keep: str,
    around: str,
    most: int,
    kinds: tuple[str, ...],
    vram: str,
    rack: str,
    settings: tuple[str, ...],
    output: str | None,
    form: str,
) -> None:
    """Make a topology of FILE, which describes a real machine.

    FORMAT is lspci (-vvv, -nnvvv -xxx, or -tv), nccl (NCCL_TOPO_DUMP_FILE), hwloc (lstopo --of
    xml) or nvidia (nvidia-smi topo -m). FILE may be - for stdin. What could not be known, what is
    otherwise than in FILE and what was folded is said on stderr and in the file's comments.
    """
    from testbed.topology.fields import BAR_SIZE, NAME
    from testbed.topology.importers import convert, fold

    options = convert.Options(
        choice=fold.Choice(_kinds(keep), most, _words(around), dict(map(_retyping, kinds))),
        vram_bytes=None if vram == AS_FOUND else _checked("--vram", BAR_SIZE, vram),
        rack=_checked("--rack", NAME, rack) if rack else "",
        settings=parse_settings(settings),
    )
    imported = convert.convert(source_format, file, options)
    _tell(imported)
    if output is not None:
        _write(Path(output), imported.text)
    if form == "json":
        notes = imported.notes
        print_json(
            "testbed.import/1",
            {
                "rack": imported.topology.rack,
                "unknown": notes.unknown,
                "changed": notes.changed,
                "folded": notes.folded,
                "devices": imported.origins,
                "topology": imported.text,
            },
        )
    elif output is None:
        click.echo(imported.text, nl=False)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _kind(option: str, word: str) -> Kind:
    from testbed.topology.importers.machine import DEVICES
    from testbed.topology.problem import listing, nearest

    kind = next((kind for kind in DEVICES if kind.value == word), None)
    if kind is None:
        close = nearest(word, DEVICES)
        message = f"'{word}' is no kind of device"
        raise InputError(diagnostics=[Diagnostic(option, 0, 0, message, listing(DEVICES), close)])
    return kind


def _kinds(text: str) -> tuple[Kind, ...]:
    return tuple(dict.fromkeys(_kind("--keep", word) for word in _words(text)))


def _retyping(pair: str) -> tuple[str, Kind]:
    device, equals, word = pair.rpartition("=")
    if not equals or not device:
        message = f"'{pair}' has no '='"
        raise InputError(diagnostics=[Diagnostic("--as", 0, 0, message, "DEVICE=KIND")])
    return device.strip(), _kind("--as", word.strip())


def _checked(option: str, rule: Size | Text, text: str) -> Any:
    """What one of the topology's own rules makes of an option's word."""
    from pydantic_core import PydanticCustomError

    try:
        return rule.validate(text)
    except PydanticCustomError as error:
        context = error.context or {}
        raise InputError(
            diagnostics=[
                Diagnostic(option, 0, 0, context["said"], context["expected"], context["nearest"])
            ]
        ) from None


def _tell(imported: Imported) -> None:
    notes = imported.notes
    for title, sentences in (
        ("not known", notes.unknown),
        ("not as in the file", notes.changed),
        ("folded", notes.folded),
    ):
        for sentence in sentences:
            say(f"{title}: {sentence}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        message = (error.strerror or str(error)).lower()
        raise InputError(diagnostics=[Diagnostic(str(path), 0, 0, message)]) from None
