# SPDX-License-Identifier: Apache-2.0
"""What the golden files hold, made from the code as it is.

``python -m tests.golden.regenerate`` writes them anew; the difference is then reviewed like any
other change. The tests compare, and never write.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from testbed.errors import InputError
from testbed.machine import argv
from testbed.machine.command import LaunchContext, NodeCommand
from testbed.topology import (
    drawing,
    graph,
    graph_dot,
    graph_svg,
    load,
    matrix,
    matrix_drawing,
    schema,
)
from testbed.topology.model import Topology, to_data
from testbed.topology.oracle import iommu_groups
from testbed.topology.placement import place

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "topologies"
GOLDEN = Path(__file__).parent
PLACED = GOLDEN / "placed"  # one topology each for what the shipped ones have not
WRONG = GOLDEN / "wrong"
REFERENCE = SHIPPED / "README.md"
WIDTH = 80  # of a terminal
KINDS = ("json", "txt", "svg", "dot")
SETTINGS_PREFIX = "# settings:"

# A host that does not exist: golden command lines must not depend on a real one.
CONTEXT = LaunchContext(
    qemu=("QEMU",),
    environment={},
    accelerator="tcg",
    kernel=Path("KERNEL"),
    initrd=Path("INITRD"),
    quick_firmware="qboot.rom",
)


def topology_files() -> list[Path]:
    """The right topologies: those shipped, and those that only the tests have."""
    return sorted(SHIPPED.glob("*.yaml")) + sorted(PLACED.glob("*.yaml"))


def wrong_files() -> list[Path]:
    """The wrong ones."""
    return sorted(WRONG.glob("*.yaml"))


def golden_of(path: Path) -> dict[Path, str]:
    """The golden files of one right topology, by path."""
    topology = load.load(path, {})
    plan = place(topology)
    commands = {
        name: argv.command(plan.nodes[name], node, CONTEXT) for name, node in topology.nodes.items()
    }
    stem = PLACED / path.stem
    picture = graph.layout(plan)
    return {
        stem.with_suffix(".resolved.json"): _json(to_data(topology)),
        stem.with_suffix(".argv.json"): _json(
            {name: command_data(command) for name, command in commands.items()}
        ),
        stem.with_suffix(".tree.txt"): drawing.tree(plan) + "\n",
        stem.with_suffix(".peers.txt"): matrix_drawing.text(matrix.matrix(plan), WIDTH) + "\n",
        stem.with_suffix(".svg"): graph_svg.svg(picture),
        stem.with_suffix(".dot"): graph_dot.dot(picture),
        stem.with_suffix(".groups.json"): _json(
            {
                name: [sorted(group) for group in iommu_groups(plan.nodes[name], node)]
                for name, node in topology.nodes.items()
            }
        ),
    }


def command_data(command: NodeCommand) -> dict[str, Any]:
    """A command with its JSON options opened up, so that a difference is one line."""
    words: list[Any] = []
    for word in command.argv:
        words.append(json.loads(word) if word.startswith("{") else word)
    memory = [{"fd": m.fd, "name": m.name, "size_bytes": m.size_bytes} for m in command.memory]
    return {"argv": words, "memory": memory}


def error_of(path: Path) -> str:
    """The error text of one wrong topology."""
    try:
        load.load_bytes(path.read_bytes(), path.name, settings_of(path))
    except InputError as error:
        return f"{error}\n"
    return "no error\n"


def settings_of(path: Path) -> dict[str, str]:
    """The ``-s`` settings that a wrong topology names in its first line."""
    first = path.read_bytes().partition(b"\n")[0].decode("utf-8", "replace")
    if not first.startswith(SETTINGS_PREFIX):
        return {}
    return dict(word.split("=", 1) for word in first.removeprefix(SETTINGS_PREFIX).split())


def reference() -> str:
    """``topologies/README.md``."""
    shipped = {path: load.load(path, {}) for path in sorted(SHIPPED.glob("*.yaml"))}
    return "\n".join(_reference_lines(shipped))


def _reference_lines(shipped: Mapping[Path, Topology]) -> Iterator[str]:
    yield (GOLDEN / "reference_introduction.md").read_text(encoding="utf-8")
    yield "## The racks here"
    yield ""
    yield "| file | what it is | settings |"
    yield "|---|---|---|"
    for path, topology in shipped.items():
        settings = ", ".join(f"`{name}={value}`" for name, value in topology.vars.items())
        yield f"| [{path.stem}]({path.name}) | {topology.description} | {settings} |"
    yield ""
    yield "## Every key"
    yield ""
    yield schema.reference_markdown()


def all_golden() -> dict[Path, str]:
    """Every golden file's content."""
    files = {REFERENCE: reference()}
    for path in topology_files():
        files |= golden_of(path)
    for path in wrong_files():
        files[path.with_suffix(".txt")] = error_of(path)
    return files


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write what differs and say so."""
    for path, content in all_golden().items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
