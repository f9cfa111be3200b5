# SPDX-License-Identifier: Apache-2.0
"""Which mirror the Debian packages come from.

In this order: the one that the user named; on Debian, the one that the host itself uses; elsewhere
the one that mmdebstrap would use. No mirror's name is written down in this project.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import InputError, MirrorError, SetupError

APT_FOLDER = Path("/etc/apt")
_SCHEMES = ("http", "https", "mirror", "mirror+", "tor+http", "file", "copy")
# One suite of Debian's main archive: not its security or third parties' archives, which hold no
# complete suite, and not a partial one such as trixie-updates.
_DEBIAN_SUITE = re.compile(r"^(stable|testing|unstable|oldstable|sid|[a-z]+)$")
_KEYRING = re.compile(r"debian-archive-")
_ANY_SUITE = "stable"  # a mirror has all of them
_ROLLING = frozenset({"stable", "testing", "unstable", "sid"})
_MMDEBSTRAP_TIMEOUT_S = 30


@dataclass(frozen=True)
class Source:
    """One entry of apt's configuration."""

    types: tuple[str, ...]
    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str = ""


def parse_one_line(text: str) -> list[Source]:
    """The classic format, ``deb [option=value …] URI suite component …`` (sources.list(5))."""
    found = []
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        matched = re.match(r"^(deb|deb-src)\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s*(.*)$", line)
        if not matched:
            continue
        kind, options, uri, suite, components = matched.groups()
        signed = re.search(r"signed-by=(\S+)", options or "", re.IGNORECASE)
        found.append(
            Source(
                (kind,), (uri,), (suite,), tuple(components.split()), signed[1] if signed else ""
            )
        )
    return found


def parse_deb822(text: str) -> list[Source]:
    """The stanza format of ``*.sources`` (sources.list(5)); disabled stanzas are left out."""
    found = []
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t"):
                if name:
                    fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false", "without", "off", "disable"):
            continue
        if "uris" in fields and "suites" in fields:
            found.append(
                Source(
                    tuple(fields.get("types", "deb").split()),
                    tuple(fields["uris"].split()),
                    tuple(fields["suites"].split()),
                    tuple(fields.get("components", "").split()),
                    fields.get("signed-by", ""),
                )
            )
    return found


def read_sources(folder: Path = APT_FOLDER) -> list[Source]:
    """All that the host's apt is configured with, in apt's order; unreadable files are ignored."""
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    found: list[Source] = []
    for file in files:
        parser = {".list": parse_one_line, ".sources": parse_deb822}.get(file.suffix)
        if parser is None:
            continue
        try:
            found += parser(file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
    return found


def debian_mirror(sources: Iterable[Source], codename: str) -> str | None:
    """The mirror of Debian's own main archive among the host's sources, or None.

    Sure: it is signed with Debian's keyring. Likely: it serves ``main`` of the host's own release
    without a key of its own. Possible: the same with a rolling suite, whose names third parties
    use too. Anything else is a third party's.
    """
    found: list[tuple[int, str]] = []
    for source in sources:
        if "deb" not in source.types or "main" not in source.components:
            continue
        if not any(_DEBIAN_SUITE.match(suite) for suite in source.suites):
            continue
        usable = [uri for uri in source.uris if uri.split(":", 1)[0].startswith(_SCHEMES)]
        if not usable:
            continue
        if _KEYRING.search(source.signed_by):
            found.append((0, usable[0]))
        elif not source.signed_by and codename in source.suites:
            found.append((1, usable[0]))
        elif not source.signed_by and not _ROLLING.isdisjoint(source.suites):
            found.append((2, usable[0]))
    return min(found, key=lambda ranked: ranked[0])[1] if found else None


def os_release(path: Path = Path("/etc/os-release")) -> Mapping[str, str]:
    """The host's os-release(5) as a mapping; empty if there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    values = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            values[name.strip()] = "".join(shlex.split(value))
    return values


def mmdebstrap_default() -> str | None:
    """The mirror of Debian that mmdebstrap would take; None if it is not installed.

    mmdebstrap writes its choice into the new root's sources.list before anything else, so a hook
    that prints that file and fails is all it takes; nothing is downloaded. ``chrootless`` needs
    neither root nor a user namespace (mmdebstrap(1), MODES).

    :raises MirrorError: it said something else.
    """
    command = [
        "mmdebstrap",
        "--mode=chrootless",
        "--variant=extract",
        "--format=null",
        '--setup-hook=cat "$1"/etc/apt/sources.list >&2; exit 1',
        _ANY_SUITE,
        "-",
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_MMDEBSTRAP_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired as error:
        raise MirrorError("mmdebstrap did not say which mirror it would use") from error
    sources = [s for s in parse_one_line(done.stderr) if _ANY_SUITE in s.suites]
    chosen = debian_mirror([Source(s.types, s.uris, s.suites, s.components) for s in sources], "")
    if chosen is None:
        raise MirrorError(
            f"mmdebstrap did not say which mirror it would use: {done.stderr.strip()[-300:]}",
            hint="name one with --mirror URL",
        )
    return chosen


def choose(
    option: str | None,
    release: Mapping[str, str],
    sources: Sequence[Source],
    fallback: Callable[[], str | None],
) -> str:
    """The mirror to use; see the module's text for the order.

    :raises InputError: ``option`` is no URL.
    :raises SetupError: there is no way to know one.
    """
    if option:
        if not re.match(r"^[a-z+]+:/{1,3}[^\s]+$", option):
            raise InputError(f"'{option}' is not the URL of a mirror", hint="--mirror URL")
        return option
    if release.get("ID") == "debian":
        found = debian_mirror(sources, release.get("VERSION_CODENAME", ""))
        if found:
            return found
    found = fallback()
    if found is None:
        raise SetupError(
            "no Debian mirror is known on this host",
            hint="install mmdebstrap, or name a mirror with --mirror URL",
        )
    return found


def host_mirror(option: str | None) -> str:
    """:func:`choose` for this very host."""
    return choose(option, os_release(), read_sources(), mmdebstrap_default)
