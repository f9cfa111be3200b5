# SPDX-License-Identifier: Apache-2.0
"""Debian packages by means of the host's apt, with a state of our own: no root, no chroot.

apt resolves, checks signatures and hashes, resumes and retries; it believes to look at an empty
system whose only installed packages are the *assumed* ones. Nothing is installed: the archives
are unpacked by dpkg-deb, and no maintainer script ever runs.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from testbed.errors import Interrupted, MirrorError, SetupError
from testbed.host import child
from testbed.host.lock import Lock, LockedPackage
from testbed.host.manifest import PackageSet
from testbed.host.progress import Progress

KEYRINGS = tuple(
    Path("/usr/share/keyrings") / f"debian-archive-keyring.{kind}" for kind in ("gpg", "pgp")
)
ARCHITECTURE = "amd64"
RESOLVE_TIMEOUT_S = 120.0
FETCH_TIMEOUT_S = 1800.0  # all of it; a mirror that stops answering is noticed far earlier
SILENCE_TIMEOUT_S = 60.0  # longer than apt's own timeout times its retries
_MIRROR_TIMEOUT_S = 6
_POLL_S = 0.2
_OWN_VARIABLES = ("APT_CONFIG", "LANGUAGE", "LANG")
_RETRIES = 2

# What of the host's own configuration concerns the way to the mirror.
_INHERITED = re.compile(r"^Acquire::(https?|ftp)::(Proxy|Verify|CA)", re.IGNORECASE)

_CONFIGURATION = """\
Dir "/"; Dir::Etc "{state}/etc"; Dir::Etc::main "none"; Dir::Etc::Parts "empty";
Dir::Etc::SourceList "{state}/sources.list"; Dir::Etc::SourceParts "empty";
Dir::Etc::Preferences "none"; Dir::Etc::PreferencesParts "empty";
Dir::Etc::Trusted "none"; Dir::Etc::TrustedParts "empty";
Dir::Etc::netrc "none"; Dir::Etc::netrcparts "empty";
Dir::State "{state}"; Dir::State::Lists "{state}/lists"; Dir::State::status "{state}/status";
Dir::State::extended_states "{state}/extended_states";
Dir::Cache "{state}"; Dir::Cache::Archives "{state}/archives";
Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache ""; Dir::Log "{state}/log";
APT::Architecture "{architecture}"; APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false"; APT::Install-Suggests "false"; APT::Sandbox::User "";
APT::Get::AllowUnauthenticated "false"; APT::Update::Error-Mode "any";
Acquire::Languages "none"; Acquire::ForceHash "SHA256"; Acquire::Retries "{retries}";
Acquire::Retries::Delay::Maximum "2";
Acquire::http::Timeout "{timeout}"; Acquire::https::Timeout "{timeout}";
Acquire::AllowInsecureRepositories "false"; Acquire::IndexTargets::deb-src::Sources "false";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false"; Acquire::PDiffs "false";
"""


class NotOffered(SetupError):
    """The mirror has no such package, or not together with what it needs."""


@dataclass(frozen=True)
class Archive:
    """One ``.deb`` as apt names it, with what the lock keeps of it."""

    file: str
    package: LockedPackage


class Apt:
    """One package set's private apt, below ``state``.

    :raises SetupError: the host has no apt-get, or lacks Debian's keyring.
    """

    def __init__(
        self, state: Path, packages: PackageSet, mirror: str, cancelled: threading.Event
    ) -> None:
        self._state = state
        self._packages = packages
        self._mirror = mirror
        self._cancelled = cancelled
        self.archives = state / "archives"
        for folder in (state / "lists/partial", self.archives / "partial", state / "etc/empty"):
            folder.mkdir(parents=True, exist_ok=True)
        (state / "status").write_text(_status(packages.assumed))
        (state / "sources.list").write_text(_sources(packages, mirror))
        self._configuration = state / "apt.conf"
        self._configuration.write_text(
            _CONFIGURATION.format(
                state=state,
                architecture=ARCHITECTURE,
                retries=_RETRIES,
                timeout=_MIRROR_TIMEOUT_S,
            )
            + _inherited_configuration()
        )

    def update(self) -> None:
        """Fetch the index and check its signature.

        :raises MirrorError: it cannot be had, or is not what Debian signed.
        """
        # apt multiplies: a mirror that accepts and stays silent costs four timeouts even so.
        self._run(["update", "-q", "-o", "Acquire::Retries=1"], SILENCE_TIMEOUT_S * 2)

    def resolve(self) -> tuple[Archive, ...]:
        """What the set consists of today.

        :raises NotOffered: a package does not exist, or cannot be had together with the others.
        """
        nowhere = f"Dir::Cache::Archives={self._state / 'nowhere'}"
        (self._state / "nowhere/partial").mkdir(parents=True, exist_ok=True)
        words = ["install", "--print-uris", "-qq", "-y", "-o", nowhere, *self._packages.packages]
        return parse_uris(self._run(words, RESOLVE_TIMEOUT_S))

    def missing(self, archives: Sequence[Archive]) -> list[Archive]:
        """Those that are not downloaded yet; apt itself checks the content of those that are."""
        found = []
        for archive in archives:
            file = self.archives / archive.file
            if not file.exists() or file.stat().st_size != archive.package.size_bytes:
                found.append(archive)
        return found

    def download(self, task: str, size_bytes: int, progress: Progress) -> None:
        """Fetch what is missing into :attr:`archives`; a download that was killed goes on.

        :raises MirrorError: it cannot be had, or its hash is wrong.
        """
        words = ["install", "--download-only", "-qq", "-y", *self._packages.packages]
        self._run(words, FETCH_TIMEOUT_S, follow=(task, size_bytes, progress))
        progress.update(task, size_bytes, size_bytes)

    def _run(
        self,
        words: list[str],
        timeout_s: float,
        follow: tuple[str, int, Progress] | None = None,
    ) -> str:
        environment = {
            **{name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES},
            "APT_CONFIG": str(self._configuration),
            "LC_ALL": "C.UTF-8",
        }
        status_read, status_write = os.pipe()
        output = self._state / f"apt-{words[0]}.log"
        try:
            with output.open("w+", encoding="utf-8", errors="replace") as log:
                try:
                    process = subprocess.Popen(
                        [
                            *child.DIE_WITH_US,
                            "apt-get",
                            "-o",
                            f"APT::Status-Fd={status_write}",
                            *words,
                        ],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        pass_fds=(status_write,),
                        process_group=0,
                    )
                except FileNotFoundError as error:
                    raise SetupError(
                        f"this host has no {error.filename}",
                        hint="Debian 12 or 13, or Ubuntu 24.04 or later",
                    ) from error
                os.close(status_write)
                status_write = -1
                try:
                    self._follow(process, status_read, timeout_s, follow)
                finally:
                    child.end(process)
                log.seek(0)
                said = log.read()
        finally:
            os.close(status_read)
            if status_write >= 0:
                os.close(status_write)
        if process.returncode != 0:
            raise _failure(self._mirror, words[0], said)
        return said

    def _follow(
        self,
        process: subprocess.Popen[bytes],
        status: int,
        timeout_s: float,
        follow: tuple[str, int, Progress] | None,
    ) -> None:
        """Wait for the end, passing apt's ``dlstatus:N:PERCENT:TEXT`` lines on.

        :raises MirrorError: nothing happened for a minute, or the whole took too long.
        :raises Interrupted: the set-up was cancelled.
        """
        now = time.monotonic()
        deadline, silent_since = now + timeout_s, now
        pending = b""
        while process.poll() is None:
            if self._cancelled.is_set():
                raise Interrupted("the set-up was ended")
            now = time.monotonic()
            if now > deadline or now - silent_since > SILENCE_TIMEOUT_S:
                raise MirrorError("apt has made no progress for too long and was ended")
            ready, _, _ = select.select([status], [], [], _POLL_S)
            if not ready:
                continue
            silent_since = time.monotonic()
            chunk = os.read(status, 65536)
            if not chunk:  # apt closed its end: it is about to exit
                time.sleep(_POLL_S / 10)
                continue
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                fields = line.split(b":", 3)
                if follow and len(fields) == 4 and fields[0] == b"dlstatus":
                    task, size_bytes, progress = follow
                    done = int(size_bytes * min(99.9, float(fields[2])) / 100)
                    progress.update(task, done, size_bytes)


def _failure(mirror: str, verb: str, said: str) -> SetupError:
    """apt's own words, sorted into "the mirror" and "what was asked for"."""
    complaints = [line[3:] for line in said.splitlines() if line.startswith("E: ")]
    complaints = [line for line in complaints if "Some index files failed" not in line]
    text = "; ".join(complaints[:3]) or said.strip()[-500:] or "no reason given"
    unresolved = re.search(r"Unable to locate|no installation candidate|broken packages", said)
    if unresolved and verb == "install":
        return NotOffered(f"the packages cannot be had from {mirror}: {text}")
    if "No space left" in said:
        return SetupError(text, hint="free some space, or set TESTBED_CACHE_DIR")
    return MirrorError(
        f"the mirror {mirror} does not give what is needed: {text}",
        hint="check the network, or take another mirror (`testbed setup --mirror URL`); "
        "the cache is intact",
    )


def parse_uris(text: str) -> tuple[Archive, ...]:
    """Lines of ``apt-get --print-uris``: ``'URI' file size SHA256:hash``.

    :raises SetupError: a line without a SHA256.
    """
    found = []
    for line in text.splitlines():
        if not line.startswith("'"):
            continue
        words = shlex.split(line)
        if len(words) != 4 or not words[3].startswith("SHA256:"):
            raise SetupError(f"apt names no SHA256 for {words[1] if len(words) > 1 else line}")
        name, version, architecture = unquote(words[1]).removesuffix(".deb").split("_")
        package = LockedPackage(
            name, version, architecture, words[3].removeprefix("SHA256:"), int(words[2])
        )
        found.append(Archive(words[1], package))
    return tuple(found)


def to_lock(archives: Sequence[Archive]) -> Lock:
    """The lock that a resolution amounts to."""
    return tuple(sorted(archive.package for archive in archives))


def _keyring() -> Path:
    for keyring in KEYRINGS:
        if keyring.exists():
            return keyring
    raise SetupError(
        "Debian's archive keyring is missing", hint="apt-get install debian-archive-keyring"
    )


def _sources(packages: PackageSet, mirror: str) -> str:
    options = f"arch={ARCHITECTURE} signed-by={_keyring()}"
    if packages.date_waived:
        options += " check-valid-until=no"
    return "".join(f"deb [{options}] {mirror} {suite} main\n" for suite in packages.suites)


def _status(assumed: Sequence[str]) -> str:
    """A dpkg status file in which only the assumed packages are installed."""
    named = (word.partition("=") for word in assumed)
    return "".join(
        f"Package: {name}\nStatus: install ok installed\nVersion: {version or '99:0'}\n"
        f"Architecture: {ARCHITECTURE}\nMulti-Arch: foreign\n"
        "Maintainer: testbed\nDescription: assumed\n\n"
        for name, _, version in named
    )


def _inherited_configuration() -> str:
    """The host's proxies and certificates, from ``apt-config dump``."""
    try:
        dumped = subprocess.run(
            ["apt-config", "dump"],
            capture_output=True,
            text=True,
            timeout=RESOLVE_TIMEOUT_S,
            check=False,
        ).stdout
    except OSError:
        return ""
    return "".join(
        line + "\n" for line in dumped.splitlines() if _INHERITED.match(line) and '""' not in line
    )


def unpack(archives: Sequence[Path], target: Path) -> None:
    """Unpack ``.deb`` files over each other into ``target``; no script of theirs runs.

    :raises SetupError: dpkg-deb refused one.
    """
    for archive in archives:
        done = subprocess.run(
            [*child.DIE_WITH_US, "dpkg-deb", "--extract", str(archive), str(target)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise SetupError(f"{archive.name} cannot be unpacked: {done.stderr.strip()[-300:]}")
