# SPDX-License-Identifier: Apache-2.0
"""Verbs about the model devices of a running rack: what they saw, and what shall go wrong."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from testbed.errors import DeviceLost, InputError
from testbed.verbs.common import format_option, print_json, rack_argument, say

if TYPE_CHECKING:
    from testbed.instruments.devices import ModelDevice
    from testbed.rack_node import RackNode

POLL_S = 0.2
WITNESSED = (
    *("accesses", "reads", "writes", "events"),
    *("local", "iommu", "message", "peer", "link", "network"),  # testbed.models.witness.Path
)


def _complete(_ctx: click.Context, _parameter: click.Parameter, word: str) -> list[str]:
    """Every model device of the racks that run, by its full name."""
    from testbed.errors import TestbedError
    from testbed.host import paths
    from testbed.instruments.devices import model_devices
    from testbed.machine import registry
    from testbed.rack import attach

    words: list[str] = []
    for info in registry.list_racks(paths.runtime_dir()):
        with contextlib.suppress(TestbedError), attach(info.name) as running:
            words += [f"{info.name}/{device}" for device in model_devices(running.nodes)]
    return [each for each in words if each.startswith(word)]


device_argument = click.argument("device", metavar="RACK[/NODE]/DEVICE", shell_complete=_complete)


@contextlib.contextmanager
def _found(word: str) -> Iterator[ModelDevice]:
    """The device of a running rack that the user named. InputError, NoSuchRack."""
    from testbed.instruments.devices import find_device, model_devices
    from testbed.rack import attach

    rack, _, device = word.partition("/")
    with attach(rack) as running:
        if not device:
            known = ", ".join(f"{rack}/{each}" for each in model_devices(running.nodes))
            raise InputError(f"which device of '{rack}'?", hint=f"its model devices: {known}")
        yield find_device(running.nodes, device)


@click.command()
@rack_argument(node=True)
@format_option("text", "json")
def devices(rack: str, form: str) -> None:
    """Every model device of RACK[/NODE]: is it there, what did it move by which path.

    Exit codes: 0 also if a device is lost (it says so); 2 no such rack or node.
    """
    from testbed.instruments.devices import model_devices, statuses
    from testbed.rack import attach, split_name

    name, node = split_name(rack)
    with attach(name) as running:
        chosen = {node: running.node(node)} if node else running.nodes
        status = {name: statuses(each) for name, each in chosen.items() if _has_models(each)}
        rows = [_row(each, status[each.node][each.name]) for each in model_devices(chosen)]
    if form == "json":
        print_json("testbed.devices/1", {"rack": name, "devices": rows})
        return
    if not rows:
        say(f"{rack} has no model devices")
    for row in rows:
        click.echo("\n".join(_lines(row)))


def _has_models(node: RackNode) -> bool:
    from testbed.machine.models import has_models

    return has_models(node.plan)


def _row(device: ModelDevice, status: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "node": device.node,
        **{key: status[key] for key in ("device", "connected", "pid", "lost", "failure")},
        "counters": None,
        "rules": [],
        "actions": [],
    }
    if status["lost"] is None:
        try:
            row |= device.report()
        except DeviceLost:  # it has just died
            row["lost"] = device.status()["lost"]
    return row


def _lines(row: Mapping[str, Any]) -> list[str]:
    state = "connected" if row["connected"] else "not connected"
    if row["lost"] is not None:
        state = f"LOST (its model died, status {row['lost']})"
    lines = [f"{row['node']}/{row['device']}  {state}, pid {row['pid']}"]
    if row["failure"]:
        lines.append(f"    failure  {row['failure']['what']} at {row['failure']['where']}")
    counters = dict(row["counters"] or {})
    events = counters.pop("events", {})
    for path, count in counters.items():
        if count["reads"] or count["writes"]:
            lines.append(
                f"    {path:<8} read {count['read_bytes']} bytes in {count['reads']},"
                f" wrote {count['written_bytes']} bytes in {count['writes']}"
            )
    happened = [f"{event} {count}" for event, count in events.items() if count]
    if happened:
        lines.append(f"    events   {', '.join(happened)}")
    lines += [f"    fault    {line}" for line in _fault_lines(row)]
    return lines


def _fault_lines(row: Mapping[str, Any]) -> list[str]:
    return [
        *(
            f"{rule['name']}: struck {rule['struck']} of {rule['seen']}"
            + ("" if rule["armed"] else " (disarmed)")
            for rule in row["rules"]
        ),
        *(action["what"] + (" (undone)" if action["undone"] else "") for action in row["actions"]),
    ]


@click.command()
@device_argument
@click.option("--follow", "-f", is_flag=True, help="Go on printing what it does; Ctrl-C ends.")
@click.option(
    "--after",
    type=click.IntRange(0),
    default=0,
    metavar="NUMBER",
    help="Only entries with a higher sequence number.",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(WITNESSED),
    metavar="WORD",
    help="Only reads, writes, accesses, events, or those by a path (iommu, peer, link, …); may be "
    "given several times.",
)
@format_option("text", "json")
def witness(device: str, follow: bool, after: int, only: tuple[str, ...], form: str) -> None:
    """What a model DEVICE did: each access with its address, size, path and target, and events.

    The device keeps the latest 4096 entries. Path `iommu` went through a mapping of the guest's
    IOMMU, `message` through QEMU (which asks its IOMMU), `peer` below a common switch, `link` over
    a private link, `network` to another NIC, `local` in its own memory. With --follow the JSON form
    is one document a line.

    Exit codes: 0; 2 no such rack or device; 128 the device is lost.
    """
    with _found(device) as found:
        while True:
            entries = found.trace(after)
            missed = entries[0]["sequence"] - after - 1 if entries and after else 0
            if missed:
                say(f"{missed} entries came and went unseen")
            after = entries[-1]["sequence"] if entries else after
            entries = [entry for entry in entries if not only or _kinds(entry) & {*only}]
            if form == "json":
                body = {"device": str(found), "missed": missed, "entries": entries}
                if not follow:
                    print_json("testbed.witness/1", body)
                elif entries:
                    click.echo(json.dumps({"format": "testbed.witness/1", **body}))
            else:
                for entry in entries:
                    click.echo(_entry_text(entry))
            if not follow:
                return
            time.sleep(POLL_S)


def _kinds(entry: Mapping[str, Any]) -> set[str]:
    """The words of ``--only`` that mean this entry."""
    if not entry["path"]:
        return {"events"}
    return {"accesses", f"{entry['what']}s", entry["path"]}


def _entry_text(entry: Mapping[str, Any]) -> str:
    head = f"{entry['sequence']:>7} {entry['time_us'] / 1e6:>14.6f} {entry['what']:<16}"
    if entry["path"]:
        where = f"{entry['path']:<8} {entry['address']:#014x} {entry['size_bytes']:>8} bytes"
        target = entry["target"] or ("qemu" if entry["outcome"] == "ok" else "nowhere")
        outcome = "" if entry["outcome"] == "ok" else f"  {entry['outcome'].upper()}"
        return f"{head} {where}  {target}{outcome}"
    return f"{head} {entry['address']:#x} {entry['outcome']}".rstrip()


@click.command()
@device_argument
@click.argument("rules", nargs=-1, metavar="[RULE…]")
@click.option("--stick/--unstick", default=None, help="Its engine takes no command; goes on.")
@click.option(
    "--lose",
    "losses",
    type=(click.Choice(["doorbell", "interrupt"]), click.IntRange(0)),
    multiple=True,
    metavar="doorbell|interrupt N",
    help="Lose its next N doorbells or interrupts; 0: no more.",
)
@click.option(
    "--link",
    "links",
    type=(str, str),
    multiple=True,
    metavar="PEER CHANGE",
    help="Its link to PEER, at both ends: down, up, narrow=LANES, slow=BANDWIDTH[,LATENCY], "
    "restore.",
)
@click.option("--remove", is_flag=True, help="Pull the card out: it answers as an empty slot.")
@click.option("--kill", is_flag=True, help="Kill its model's process.")
@click.option(
    "--clear",
    is_flag=True,
    help="Disarm the RULEs; without one, undo all that can be undone, links too.",
)
@click.option("--list", "only_list", is_flag=True, help="Say what is armed, and what else holds.")
@format_option("text", "json")
def inject(
    device: str,
    rules: tuple[str, ...],
    stick: bool | None,
    losses: Sequence[tuple[str, int]],
    links: Sequence[tuple[str, str]],
    remove: bool,
    kill: bool,
    clear: bool,
    only_list: bool,
    form: str,
) -> None:
    """Let something go wrong in a model DEVICE while the rack runs; docs/faults.md.

    A RULE is `drop`, `delay`, `corrupt`, `poison` or `reorder`, then perhaps `read` or `write`, and
    any of nth=3, every=10, after=5, times=2, min=4K, range=0x1000+64K, path=link, probability=0.1,
    seed=7, for=2ms. Its words are its name. Several may follow one another; a topology's `faults:`
    takes the same words.

    Exit codes: 0 done; 2 no such rack or device, or a wrong rule (then nothing is done); 128 the
    device is lost.
    """
    from testbed.instruments.devices import LinkChange
    from testbed.topology.fault_rules import parse_rules, split_rules

    wanted = split_rules(rules)
    changes = [(peer, LinkChange.parse(change)) for peer, change in links]
    if not clear:
        parse_rules(wanted, by="command")  # what is wrong is said before anything is done
    asked = (wanted, changes, losses, remove, kill, clear, only_list, stick is not None)
    if not any(asked):
        raise InputError("what shall go wrong? give a RULE or an option", hint="see --help")
    with _found(device) as found:
        (_clear if clear else _arm)(found, wanted)
        if stick is not None:
            found.stick(on=stick)
        for what, count in losses:
            found.lose(what, count)
        for peer, change in changes:
            found.change_link(peer, change)
        if remove:
            found.remove()
        if kill:
            found.kill()
        row = _row(found, found.status())
    if form == "json":
        print_json("testbed.inject/1", row)
    elif only_list:
        for line in _armed_lines(row):
            click.echo(line)
    else:
        say(f"{device}: {'; '.join(_armed_lines(row)) or 'nothing is armed'}")


def _armed_lines(row: Mapping[str, Any]) -> list[str]:
    """What still holds."""
    armed = [each for each in row["rules"] if each["armed"]]
    done = [each for each in row["actions"] if not each["undone"]]
    return _fault_lines({**row, "rules": armed, "actions": done})


def _arm(device: ModelDevice, rules: Sequence[str]) -> None:
    device.arm(*rules)


def _clear(device: ModelDevice, rules: Sequence[str]) -> None:
    for rule in rules:
        device.disarm(rule)
    if not rules:
        device.restore()
