# SPDX-License-Identifier: Apache-2.0
"""A matrix file to its cells; each stage says all of its faults at once, at their places."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from testbed.chosen_topology import shipped_topologies
from testbed.errors import InputError
from testbed.matrix.cells import Cell, Parts, Suite, expand
from testbed.matrix.model import (
    DEFAULT_QEMU,
    EMPTY_SUITE,
    MOST_CELLS,
    PLURALS,
    SUFFIX,
    Matrix,
)
from testbed.topology import load as topologies
from testbed.topology.document import read_document
from testbed.topology.model import Topology
from testbed.topology.problem import DataPath, Problem, listing, nearest
from testbed.topology.validation import explain

WHOLE = "the matrix"


@dataclass(frozen=True)
class Plan:
    """A matrix file, understood. ``content`` is the file's bytes."""

    file: str
    matrix: Matrix
    cells: tuple[Cell, ...]
    content: bytes = field(default=b"", repr=False)


def load(path: Path, settings: Mapping[str, str], *, trust: bool = False) -> Plan:
    """The matrix in a file.

    :param settings: of ``-s``, for the file's ``vars:``.
    :param trust: its topologies may have devices of their own.
    :raises InputError: everything that is wrong with it.
    """
    content = topologies.read(path)
    name, folder = str(path), path.absolute().parent
    file = read_document(content, name, settings)
    try:
        matrix = Matrix.model_validate(file.data)
    except ValidationError as error:
        raise file.error(explain(error, Matrix, whole=WHOLE)) from None
    if problems := list(_count(matrix)):
        raise file.error(problems)
    reader = _Reader(matrix, folder, trust)
    parts = reader.parts()
    if reader.problems:
        raise file.error(reader.problems)
    return Plan(name, matrix, expand(matrix, parts), content)


def find(word: str) -> Path:
    """A file, or a shipped matrix by its name; InputError: neither."""
    from testbed.errors import Diagnostic  # noqa: PLC0415

    shipped = shipped_matrices()
    if Path(word).exists() or "/" in word or word.endswith((".yaml", ".yml")):
        return Path(word)
    if word not in shipped:
        known = f"a file, or {listing(shipped)}"
        near = nearest(word, shipped)
        raise InputError(diagnostics=[Diagnostic(word, 0, 0, "no such matrix", known, near)])
    return shipped[word]


def shipped_matrices() -> dict[str, Path]:
    """The matrices that come with the testbed, by name."""
    from testbed.host import paths  # noqa: PLC0415

    folder = paths.data_dir("topologies") / "matrices"
    return {p.name.removesuffix(SUFFIX): p for p in sorted(folder.glob(f"*{SUFFIX}"))}


def _count(matrix: Matrix) -> Iterator[Problem]:
    if not matrix.topologies and not matrix.include:
        yield Problem((), "the matrix has no cell", "'topologies', or an 'include'")
    cells = len(matrix.include) * len(matrix.suites)
    if matrix.topologies:
        product = 1
        for axis in PLURALS:
            product *= len(matrix.values(axis))
        cells += product
    if cells * matrix.repeat > MOST_CELLS:
        path: DataPath = ("repeat",) if matrix.repeat > 1 else ()
        yield Problem(path, f"{cells * matrix.repeat} cells are too many", f"at most {MOST_CELLS}")


@dataclass
class _Reader:
    """Looks up what the words of a matrix name, and notes what does not exist."""

    matrix: Matrix
    folder: Path
    trust: bool
    problems: list[Problem] = field(default_factory=list)

    def parts(self) -> Parts:
        """Everything that is named, loaded; of no use if there are problems."""
        found: dict[str, Topology] = {}
        suites: dict[str, Suite] = {}
        for path, word in self._words("topology"):
            if word not in found and (topology := self._topology(path, word)) is not None:
                found[word] = topology
        for path, word in self._words("suite"):
            if word not in suites and (suite := self._suite(path, word)) is not None:
                suites[word] = suite
        for path, word in self._words("kernel"):
            self._check_kernel(path, word)
        for path, word in self._words("qemu"):
            if word != DEFAULT_QEMU and "/" not in word:
                expected = f"{DEFAULT_QEMU}, or a path"
                near = nearest(word, [DEFAULT_QEMU])
                self.problems.append(Problem(path, f"'{word}' is no path", expected, near))
        self._check_exclusions()
        return Parts(found, suites)

    def _words(self, axis: str) -> Iterator[tuple[DataPath, str]]:
        plural = PLURALS[axis]
        for at, word in enumerate(getattr(self.matrix, plural)):
            yield (plural, at), word
        for at, more in enumerate(self.matrix.include):
            if (word := getattr(more, axis)) is not None:
                yield ("include", at, axis), word

    def _topology(self, path: DataPath, word: str) -> Topology | None:
        name, *settings = shlex.split(word)
        shipped = shipped_topologies()
        file = shipped.get(name) or self.folder / name
        if not file.is_file():
            known = f"{listing(shipped)}, or a file beside the matrix"
            near = nearest(name, [*shipped, *(p.name for p in self.folder.glob("*.y*ml"))])
            self.problems.append(Problem(path, f"there is no topology '{name}'", known, near))
            return None
        wrong = [each for each in settings if "=" not in each]
        if wrong:
            message = f"'{wrong[0]}' is no setting of '{name}'"
            self.problems.append(Problem(path, message, "NAME=VALUE"))
            return None
        from testbed.machine import own_devices  # noqa: PLC0415  slow

        chosen = dict(each.split("=", 1) for each in settings)
        try:
            return topologies.load(file, chosen, admit=own_devices.admission(trust=self.trust))
        except InputError as error:
            if not any(each.file.startswith("-s ") for each in error.diagnostics):
                raise  # the topology's own faults, at their places in its file
            self.problems += [
                Problem(path, each.message, each.expected, each.nearest)
                for each in error.diagnostics
            ]
            return None

    def _suite(self, path: DataPath, word: str) -> Suite | None:
        from testbed.harness.shipped import ALL_SUITES, SUITES  # noqa: PLC0415  slow

        names = [*SUITES, ALL_SUITES, EMPTY_SUITE]
        if word in names:
            return Suite(word)
        file = self.folder / word.partition("::")[0]
        if file.is_file():
            return Suite(word, file.resolve())
        known = f"{listing(names)}, or a file beside the matrix"
        message = f"there is no suite '{word}'"
        self.problems.append(Problem(path, message, known, nearest(word, names)))
        return None

    def _check_kernel(self, path: DataPath, word: str) -> None:
        from testbed.host import manifest  # noqa: PLC0415  slow

        known = [*manifest.load().kernels]
        if word not in known and "/" not in word:
            message = f"kernel '{word}' is no name that is known"
            expected = f"{listing(known)}, or a path"
            self.problems.append(Problem(path, message, expected, nearest(word, known)))

    def _check_exclusions(self) -> None:
        """A rule that names nothing would leave out everything; one that fits nothing is a slip."""
        import fnmatch  # noqa: PLC0415

        for at, rule in enumerate(self.matrix.exclude):
            if not rule.patterns:
                self.problems.append(Problem(("exclude", at), "an empty rule", "a pattern"))
            for axis, pattern in rule.patterns.items():
                entries: tuple[Any, ...] = self.matrix.values(axis)
                if not any(fnmatch.fnmatchcase(entry, pattern) for entry in entries):
                    message = f"'{pattern}' is no entry of '{PLURALS[axis]}'"
                    known = listing(entries) if entries != ("",) else "an axis that is named"
                    near = nearest(pattern, entries)
                    self.problems.append(Problem(("exclude", at, axis), message, known, near))
