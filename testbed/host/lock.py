# SPDX-License-Identifier: Apache-2.0
"""Which packages exactly: the lock of each product, and the reviewed one in ``images/lock.json``.

The mirror moves on, and that is fine and said; but one version of one package has one content, for
ever. If a mirror offers other bytes under a reviewed name and version, nothing is installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from testbed.errors import SetupError
from testbed.host import product

FORMAT = 1


@dataclass(frozen=True, order=True)
class LockedPackage:
    """One package as the mirror's signed index describes it."""

    name: str
    version: str
    architecture: str
    sha256: str
    size_bytes: int


Lock = tuple[LockedPackage, ...]


@dataclass(frozen=True)
class Drift:
    """How a resolution differs from what was reviewed; each entry is one readable line."""

    conflicts: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def compare(reviewed: Iterable[LockedPackage], resolved: Iterable[LockedPackage]) -> Drift:
    """``conflicts``: same name and version, other content. ``changes``: anything else."""
    old = {(p.name, p.architecture): p for p in reviewed}
    new = {(p.name, p.architecture): p for p in resolved}
    conflicts, changes = [], []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before is None:
            changes.append(f"{key[0]} {new[key].version} is new")
        elif after is None:
            changes.append(f"{key[0]} {before.version} is gone")
        elif before.version != after.version:
            changes.append(f"{key[0]} {before.version} is now {after.version}")
        elif before.sha256 != after.sha256:
            conflicts.append(
                f"{key[0]} {before.version}: {after.sha256} instead of {before.sha256}"
            )
    return Drift(tuple(conflicts), tuple(changes))


def check(set_name: str, reviewed: Lock | None, resolved: Lock, *, locked: bool) -> Drift:
    """Refuse what must not be used.

    :param reviewed: None if the set was never reviewed.
    :param locked: refuse every difference, not only changed content.
    :raises SetupError: with each package that is to blame.
    """
    if reviewed is None:
        if locked:
            raise SetupError(
                f"{set_name} is not in images/lock.json",
                hint="`testbed setup --update-lock` records it",
            )
        return Drift()
    drift = compare(reviewed, resolved)
    if drift.conflicts:
        raise SetupError(
            f"{set_name}: the mirror offers other content under a reviewed name and version: "
            + "; ".join(drift.conflicts),
            hint="do not trust this mirror until you know why; --mirror URL takes another",
        )
    if locked and drift.changes:
        raise SetupError(
            f"{set_name} is not as reviewed: " + "; ".join(drift.changes),
            hint="without --locked the newer packages are used; --update-lock records them",
        )
    return drift


def to_json(packages: Lock) -> list[dict[str, object]]:
    """As it is stored."""
    return [asdict(package) for package in sorted(packages)]


def from_json(values: Sequence[Mapping[str, object]]) -> Lock:
    """The reverse of :func:`to_json`.

    :raises SetupError: it is something else.
    """
    try:
        return tuple(sorted(LockedPackage(**value) for value in values))  # type: ignore[arg-type]
    except TypeError as error:
        raise SetupError(f"a lock file is not understood: {error}") from error


def read_reviewed(path: Path) -> dict[str, Lock]:
    """The reviewed sets by name; empty if the file does not exist.

    :raises SetupError: the file is there but says nothing readable.
    """
    if not path.exists():
        return {}
    stored = product.read_json(path)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise SetupError(f"{path} is not a lock file of format {FORMAT}")
    return {name: from_json(packages) for name, packages in stored["sets"].items()}


def write_reviewed(path: Path, sets: Mapping[str, Lock]) -> None:
    """Record the sets; those that are not among ``sets`` stay as they were.

    :raises SetupError: the file cannot be written.
    """
    merged = {**read_reviewed(path), **sets}
    stored = {name: to_json(packages) for name, packages in merged.items()}
    try:
        product.write_json(path, {"format": FORMAT, "sets": stored})
    except OSError as error:
        raise product.disk_error(error, path) from error
