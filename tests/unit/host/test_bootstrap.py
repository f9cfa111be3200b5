# SPDX-License-Identifier: Apache-2.0
"""bootstrap, in a folder of its own, with programs that only note how they were called."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ("bootstrap", "images/init")

# Its `-m venv` fails like Debian's while python3-venv is missing; its pip brings the commands.
PYTHON = """\
#!/bin/sh
case "$*" in
*version_info*) ;;
-V) echo "Python 3.11.2" ;;
"-m venv "*)
    echo "venv" >>"{notes}/calls"
    mkdir -p "$3/bin" && [ ! -e "{notes}/no-venv" ] && cp "$0" "$3/bin/python" ;;
*"import pip"*) [ ! -e "{notes}/no-pip" ] ;;
*"pip "*install*)
    echo "pip $*" >>"{notes}/calls"
    [ ! -e "{notes}/offline" ] || exit 1
    for name in testbed tox; do
        printf '#!/bin/sh\\necho %s "$@"\\n' "$name" >"${{0%/*}}/$name"
        chmod +x "${{0%/*}}/$name"
    done ;;
*) exit 9 ;;
esac
"""
APT_GET = """\
#!/bin/sh
echo "apt-get $*" >>"{notes}/calls"
case "$*" in *python3-venv*) rm -f "{notes}/no-venv" ;; esac
"""


@dataclass
class Host:
    """A machine on which little is installed."""

    checkout: Path
    tools: Path
    notes: Path

    def has(self, *switches: str) -> None:
        for name in switches:
            (self.notes / name).write_text("")

    def has_no_more(self, *switches: str) -> None:
        for name in switches:
            (self.notes / name).unlink()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.checkout / "bootstrap"), *words],
            env={"PATH": str(self.tools), "HOME": "/nowhere"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[str]:
        file = self.notes / "calls"
        found = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    tools, notes, checkout = tmp_path / "tools", tmp_path / "notes", tmp_path / "my checkout"
    for folder in (tools, notes, checkout):
        folder.mkdir()
    for name in ("bootstrap", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout / name)
    for name in (
        "sh",
        "cat",
        "chmod",
        "cksum",
        "cp",
        "dirname",
        "env",
        "flock",
        "grep",
        "ls",
        "mkdir",
        "rm",
    ):
        real = shutil.which(name)
        assert real
        (tools / name).symlink_to(real)
    for name, text in {
        "python3": PYTHON,
        "apt-get": APT_GET,
        "mmdebstrap": "#!/bin/sh\n",
        "id": "#!/bin/sh\necho 0\n",
    }.items():
        (tools / name).write_text(text.format(notes=notes))
        (tools / name).chmod(0o755)
    return Host(checkout, tools, notes)


def test_everything_is_passed_on(host: Host) -> None:
    done = host.run("run", "-k", "two words")
    assert (done.returncode, done.stdout) == (0, "testbed run -k two words\n"), done.stderr
    calls = host.calls()
    assert calls[0] == "venv"
    assert calls[1].endswith(f"install -e {host.checkout}")


def test_a_second_time_nothing_is_installed(host: Host) -> None:
    host.run("run")
    host.calls()
    assert host.run("run").returncode == 0
    assert host.calls() == []


def test_the_tests_take_the_dev_extras_once(host: Host) -> None:
    host.run("run")
    host.calls()
    done = host.run("test", "-e", "lint")
    assert done.stdout == "tox -e lint\n"
    assert [call.split()[-1][-5:] for call in host.calls()] == ["[dev]"]
    assert host.run("run").stdout == "testbed run\n"
    assert host.calls() == []


def test_another_pyproject_is_installed_again(host: Host) -> None:
    host.run("run")
    host.calls()
    with (host.checkout / "pyproject.toml").open("a") as file:
        file.write("# more\n")
    host.run("run")
    assert [call.split()[0] for call in host.calls()] == ["pip"], "into the same .venv"


def test_a_moved_checkout_gets_a_new_venv(host: Host) -> None:
    host.run("run")
    host.calls()
    host.checkout = host.checkout.rename(host.checkout.parent / "moved")
    assert host.run("run").returncode == 0
    assert [call.split()[0] for call in host.calls()] == ["venv", "pip"]


def test_a_half_made_venv_is_made_again(host: Host) -> None:
    (host.checkout / ".venv/bin").mkdir(parents=True)
    assert host.run("run").returncode == 0
    host.calls()
    (host.checkout / ".venv/.testbed-stamp").unlink()
    host.has("no-pip")
    host.run("run")
    assert host.calls()[0] == "venv"


def test_no_network_and_then_again(host: Host) -> None:
    host.has("offline")
    done = host.run("run")
    assert done.returncode == 128
    assert "run this again" in done.stderr
    host.has_no_more("offline")
    assert host.run("run").returncode == 0


def test_what_is_missing_is_installed(host: Host) -> None:
    host.has("no-venv")
    assert host.run("run").returncode == 0
    installed = [call for call in host.calls() if call.startswith("apt-get")]
    assert len(installed) == 1
    assert installed[0].endswith("install python3-venv")


def test_neither_root_nor_sudo(host: Host) -> None:
    (host.tools / "id").write_text("#!/bin/sh\necho 1000\n")
    host.has("no-venv")
    done = host.run("run")
    assert done.returncode == 128
    assert "neither root nor sudo to install them: python3-venv" in done.stderr
    assert not [call for call in host.calls() if call.startswith("apt-get")]


def test_no_debian(host: Host) -> None:
    (host.tools / "apt-get").unlink()
    done = host.run("run")
    assert done.returncode == 128
    assert "Debian 12 or 13, or Ubuntu 24.04 or later" in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_is_content(name: str) -> None:
    tool = shutil.which("shellcheck")
    assert tool, "shellcheck is a part of the dev extra"
    done = subprocess.run([tool, str(ROOT / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_can_be_run(name: str) -> None:
    assert (ROOT / name).stat().st_mode & 0o111
