# SPDX-License-Identifier: Apache-2.0
"""A mirror without a network: an ``apt-get`` that serves a folder of real, tiny packages."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from testbed.host.manifest import PackageSet
from testbed.host.packages import SetupOptions

APT_GET = """\
#!/bin/sh
echo "$*" >>"{mirror}/calls"
echo $$ >>"{mirror}/pids"
archives=$(sed -n 's/.*Dir::Cache::Archives "\\([^"]*\\)".*/\\1/p' "$APT_CONFIG")
case "$*" in
*--print-uris*) cat "{mirror}/uris" ;;
*--download-only*)
    for deb in "{mirror}"/*.deb; do
        [ -e "$archives/${{deb##*/}}" ] && continue
        [ -e "{mirror}/breaks" ] && [ "${{deb##*/}}" = "$(cat "{mirror}/breaks")" ] && exit 100
        cp "$deb" "$archives/"
        echo "${{deb##*/}}" >>"{mirror}/served"
        [ ! -e "{mirror}/hangs" ] || sleep 60
    done ;;
*)
    if [ -e "{mirror}/down" ]; then
        echo "E: Failed to fetch: Connection timed out"
        exit 100
    fi ;;
esac
"""


@dataclass(frozen=True)
class FakeMirror:
    """What the fake apt-get serves, and how it was called."""

    folder: Path

    def offer(self, name: str, version: str = "1", content: str = "content") -> None:
        """Put a package on the mirror; another version of it goes away."""
        for old in self.folder.glob(f"{name}_*.deb"):
            old.unlink()
        root = self.folder / "build"
        (root / "DEBIAN").mkdir(parents=True, exist_ok=True)
        (root / "usr/share/doc").mkdir(parents=True, exist_ok=True)
        (root / "usr/share/doc" / name).write_text("not wanted")
        (root / f"usr/{name}").write_text(content)
        (root / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: amd64\n"
            "Maintainer: nobody\nDescription: a test\n"
        )
        deb = self.folder / f"{name}_{version.replace(':', '%3a')}_amd64.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-b", str(root), str(deb)],
            check=True,
            capture_output=True,
        )
        subprocess.run(["rm", "-r", str(root)], check=True)
        self.publish()

    def publish(self, **wrong_hashes: str) -> None:
        """Write the index."""
        lines = []
        for deb in sorted(self.folder.glob("*.deb")):
            data = deb.read_bytes()
            name = deb.name.split("_")[0]
            sha256 = wrong_hashes.get(name, hashlib.sha256(data).hexdigest())
            lines.append(f"'http://m.test/{deb.name}' {deb.name} {len(data)} SHA256:{sha256}\n")
        (self.folder / "uris").write_text("".join(lines))

    def switch(self, name: str, content: str = "") -> None:
        """Turn ``down``, ``hangs`` or ``breaks`` on."""
        (self.folder / name).write_text(content)

    def heal(self) -> None:
        """Turn all of them off."""
        for name in ("down", "hangs", "breaks"):
            (self.folder / name).unlink(missing_ok=True)

    def lines(self, name: str) -> list[str]:
        """What was noted in ``calls`` or ``served``."""
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def fake_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMirror:
    folder = tmp_path / "mirror"
    tools = tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    (tools / "apt-get").write_text(APT_GET.format(mirror=folder))
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    return FakeMirror(folder)


@pytest.fixture
def package_set() -> PackageSet:
    return PackageSet(suites=("trixie",), packages=("one", "two"))


@pytest.fixture
def setup_options(tmp_path: Path) -> SetupOptions:
    return SetupOptions(cache=tmp_path / "the cache", mirror="http://m.test/debian")
