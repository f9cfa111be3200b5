# SPDX-License-Identifier: Apache-2.0
"""Reading the host's apt configuration, and choosing a mirror from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.errors import InputError, MirrorError, SetupError
from testbed.host import mirror

DEBIAN = {"ID": "debian", "VERSION_CODENAME": "trixie"}
UBUNTU = {"ID": "ubuntu", "VERSION_CODENAME": "noble"}


def nothing() -> str | None:
    return None


def test_the_one_line_format() -> None:
    found = mirror.parse_one_line(
        "# deb http://commented.test/debian trixie main\n"
        "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
        " http://one.test/debian trixie main contrib # note\n"
        "deb-src http://one.test/debian trixie main\n"
        "\n"
        "nonsense\n"
    )
    assert [(s.types, s.uris, s.suites, s.components) for s in found] == [
        (("deb",), ("http://one.test/debian",), ("trixie",), ("main", "contrib")),
        (("deb-src",), ("http://one.test/debian",), ("trixie",), ("main",)),
    ]
    assert found[0].signed_by.endswith("debian-archive-keyring.gpg")


def test_the_stanza_format() -> None:
    found = mirror.parse_deb822(
        "# a comment\n"
        "Types: deb deb-src\n"
        "URIs: http://one.test/debian\n"
        " http://two.test/debian\n"
        "Suites: trixie trixie-updates\n"
        "Components: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.pgp\n"
        "\n"
        "Enabled: no\n"
        "Types: deb\n"
        "URIs: http://off.test/debian\n"
        "Suites: trixie\n"
        "Components: main\n"
    )
    assert len(found) == 1
    assert found[0].uris == ("http://one.test/debian", "http://two.test/debian")
    assert found[0].suites == ("trixie", "trixie-updates")
    assert found[0].types == ("deb", "deb-src")


def test_files_of_both_formats_are_read(tmp_path: Path) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text("deb http://a.test/debian trixie main\n")
    (parts / "b.list").write_text("deb http://b.test/debian trixie main\n")
    (parts / "c.sources").write_text(
        "Types: deb\nURIs: http://c.test/debian\nSuites: sid\nComponents: main\n"
    )
    (parts / "d.list.disabled").write_text("deb http://d.test/debian trixie main\n")
    assert [s.uris[0][7] for s in mirror.read_sources(tmp_path)] == ["a", "b", "c"]
    assert mirror.read_sources(tmp_path / "nowhere") == []


def source(uri: str, suite: str = "trixie", part: str = "main", key: str = "") -> mirror.Source:
    return mirror.Source(("deb",), (uri,), (suite,), (part,), key)


def test_third_parties_are_passed_over() -> None:
    sources = [
        source("http://a.test/linux", "nodistro"),
        source("http://b.test/linux", part="stable", key="/etc/apt/keyrings/b.gpg"),
        source("http://c.test/repo", key="/usr/share/keyrings/c.gpg"),
        source("http://d.test/pgdg", "trixie-pgdg"),
        source("http://e.test/debian-security", "trixie-security"),
        source("cdrom:[Debian]/"),
        source("http://f.test/debian"),
    ]
    assert mirror.debian_mirror(sources, "trixie") == "http://f.test/debian"


def test_a_rolling_host() -> None:
    browser, debian = source("http://a.test/browser", "stable"), source("http://b.test/debian")
    assert mirror.debian_mirror([browser, debian], "trixie") == "http://b.test/debian"
    rolling = source("http://c.test/debian", "testing")
    assert mirror.debian_mirror([rolling], "forky") == "http://c.test/debian"


def test_debians_own_key_decides() -> None:
    sources = [
        source("http://a.test/other"),
        source("http://b.test/debian", key="/usr/share/keyrings/debian-archive-keyring.gpg"),
    ]
    assert mirror.debian_mirror(sources, "trixie") == "http://b.test/debian"


def test_a_list_of_mirrors_is_a_mirror() -> None:
    uri = "mirror+file:///etc/apt/mirrors/debian.list"
    assert mirror.debian_mirror([source(uri)], "trixie") == uri


def test_the_users_choice_comes_first() -> None:
    sources = [source("http://a.test/debian")]
    assert mirror.choose("http://x.test/d", DEBIAN, sources, nothing) == "http://x.test/d"
    with pytest.raises(InputError, match="not the URL"):
        mirror.choose("x.test", DEBIAN, sources, nothing)


def test_on_debian_the_hosts_own() -> None:
    sources = [source("http://a.test/debian")]
    assert mirror.choose(None, DEBIAN, sources, nothing) == "http://a.test/debian"


def test_elsewhere_the_one_of_mmdebstrap() -> None:
    sources = [source("http://archive.test/ubuntu", "noble")]
    assert mirror.choose(None, UBUNTU, sources, lambda: "http://m.test/debian") == (
        "http://m.test/debian"
    )
    with pytest.raises(SetupError, match="no Debian mirror is known"):
        mirror.choose(None, UBUNTU, sources, nothing)


@pytest.fixture
def fake_mmdebstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs its --setup-hook on a root, as the real one does, and fails like it."""
    tool = tmp_path / "mmdebstrap"
    tool.write_text(
        "#!/bin/sh\n"
        'root=$(mktemp -d); mkdir -p "$root/etc/apt"\n'
        "for word; do case $word in --setup-hook=*) hook=${word#*=} ;; esac; done\n"
        f'cat "{tmp_path}/offered" >"$root/etc/apt/sources.list"\n'
        'sh -c "$hook" hook "$root"; status=$?\n'
        'rm -r "$root"; exit $status\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "offered"


def test_what_mmdebstrap_would_use(fake_mmdebstrap: Path) -> None:
    fake_mmdebstrap.write_text(
        "deb http://m.test/debian stable main\ndeb http://s.test/s stable-security main\n"
    )
    assert mirror.mmdebstrap_default() == "http://m.test/debian"


def test_mmdebstrap_that_says_nothing(fake_mmdebstrap: Path) -> None:
    fake_mmdebstrap.write_text("")
    with pytest.raises(MirrorError, match="did not say"):
        mirror.mmdebstrap_default()


def test_no_mmdebstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert mirror.mmdebstrap_default() is None


def test_os_release(tmp_path: Path) -> None:
    file = tmp_path / "os-release"
    file.write_text('ID=debian\nPRETTY_NAME="Debian 13 (x)"\n# no\n\n')
    assert mirror.os_release(file) == {"ID": "debian", "PRETTY_NAME": "Debian 13 (x)"}
    assert mirror.os_release(tmp_path / "none") == {}
