# SPDX-License-Identifier: Apache-2.0
"""A package set becomes a folder: once, whole or not at all, and without the mirror after that."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.errors import Interrupted, MirrorError, SetupError
from testbed.host import packages, product
from testbed.host.manifest import PackageSet
from testbed.host.packages import SetupOptions

from .conftest import FakeMirror


def leftovers(options: SetupOptions) -> list[str]:
    """Products, finished or not, and pointers."""
    folders = [options.cache / "packages", options.cache / "current"]
    return [path.name for folder in folders if folder.exists() for path in folder.iterdir()]


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def offered(fake_mirror: FakeMirror) -> FakeMirror:
    fake_mirror.offer("one", "1:1.0-1")
    fake_mirror.offer("two", "2.0")
    return fake_mirror


def test_a_set_is_unpacked_and_described(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    made = packages.ensure("set", package_set, setup_options)
    assert (made.root / "usr/one").read_text() == "content"
    assert not (made.root / "usr/share/doc").exists(), "what nobody reads is left out"
    assert [(p.name, p.version) for p in made.packages] == [("one", "1:1.0-1"), ("two", "2.0")]
    assert made.version("two") == "2.0"
    assert not (setup_options.cache / "apt" / "set").exists(), "the downloads are gone"


def test_a_finished_set_asks_nobody(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    made = packages.ensure("set", package_set, setup_options)
    calls = offered.lines("calls")
    offered.switch("down")
    assert packages.ensure("set", package_set, setup_options) == made
    offline = dataclasses.replace(setup_options, offline=True)
    assert packages.ensure("set", package_set, offline) == made
    assert offered.lines("calls") == calls


def test_another_entry_is_another_product(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    first = packages.ensure("set", package_set, setup_options)
    other = package_set.model_copy(update={"assumed": ("three",)})
    assert packages.ensure("set", other, setup_options).key != first.key


def test_offline_and_not_there(package_set: PackageSet, setup_options: SetupOptions) -> None:
    offline = dataclasses.replace(setup_options, offline=True)
    with pytest.raises(packages.NotSetUp, match="set is not set up"):
        packages.ensure("set", package_set, offline)


def test_a_mirror_that_does_not_answer(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    made = packages.ensure("set", package_set, setup_options)
    offered.switch("down")
    again = dataclasses.replace(setup_options, refresh=True)
    with pytest.raises(MirrorError, match="Connection timed out") as caught:
        packages.ensure("set", package_set, again)
    assert "m.test" in str(caught.value)
    assert "--mirror" in caught.value.hint
    assert packages.ensure("set", package_set, setup_options) == made, "the cache is intact"


def test_a_download_that_breaks_off_is_taken_up_again(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    offered.switch("breaks", "two_2.0_amd64.deb")
    with pytest.raises(MirrorError):
        packages.ensure("set", package_set, setup_options)
    assert leftovers(setup_options) == []
    offered.heal()
    packages.ensure("set", package_set, setup_options)
    assert sorted(offered.lines("served")) == ["one_1%3a1.0-1_amd64.deb", "two_2.0_amd64.deb"]


def test_a_killed_setup_is_taken_up_again(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    offered.switch("hangs")
    script = (
        "import sys; from pathlib import Path\n"
        "from testbed.host import packages\n"
        "from testbed.host.manifest import PackageSet\n"
        "packages.ensure('set', PackageSet(suites=('trixie',), packages=('one', 'two')),\n"
        "    packages.SetupOptions(Path(sys.argv[1]), mirror='http://m.test/debian'))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(setup_options.cache)])
    wait_until(lambda: bool(offered.lines("served")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = int(offered.lines("pids")[-1])
    wait_until(lambda: not Path(f"/proc/{last}").exists())
    offered.heal()
    assert leftovers(setup_options) == []
    packages.ensure("set", package_set, setup_options)
    assert len(offered.lines("served")) == 2, "what was there was not fetched again"


def test_a_cancelled_setup_ends_at_once(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    offered.switch("hangs")
    timer = threading.Timer(0.5, setup_options.cancelled.set)
    timer.start()
    began_s = time.monotonic()
    with pytest.raises(Interrupted):
        packages.ensure("set", package_set, setup_options)
    timer.join()
    assert time.monotonic() - began_s < 15


def test_two_at_once_make_one(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    made: list[packages.PackageRoot] = []
    threads = [
        threading.Thread(
            target=lambda: made.append(packages.ensure("set", package_set, setup_options))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0] == made[1]
    assert len(offered.lines("served")) == 2


def test_an_interrupted_unpacking_is_no_product(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    (offered.folder / "two_2.0_amd64.deb").write_bytes(b"broken")
    offered.publish()
    with pytest.raises(SetupError, match="cannot be unpacked"):
        packages.ensure("set", package_set, setup_options)
    assert leftovers(setup_options) == []


def test_newer_packages_are_used_and_told(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    old = packages.ensure("set", package_set, setup_options)
    offered.offer("two", "3.0")
    reviewed = {"set": old.packages}
    newer = packages.ensure(
        "set", package_set, dataclasses.replace(setup_options, refresh=True, reviewed=reviewed)
    )
    assert newer.version("two") == "3.0"
    locked = dataclasses.replace(setup_options, locked=True, reviewed=reviewed)
    with pytest.raises(SetupError, match=r"two 2\.0 is now 3\.0"):
        packages.ensure("set", package_set, locked)
    as_reviewed = dataclasses.replace(locked, reviewed={"set": newer.packages})
    assert packages.ensure("set", package_set, as_reviewed) == newer


def test_changed_content_is_refused(
    offered: FakeMirror, package_set: PackageSet, setup_options: SetupOptions
) -> None:
    old = packages.ensure("set", package_set, setup_options)
    offered.offer("two", "2.0", content="something else")
    options = dataclasses.replace(setup_options, refresh=True, reviewed={"set": old.packages})
    with pytest.raises(SetupError, match=r"other content .* two 2\.0"):
        packages.ensure("set", package_set, options)


def test_a_cache_that_cannot_be_written(
    offered: FakeMirror, package_set: PackageSet, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    options = SetupOptions(tmp_path / "file" / "cache", mirror="http://m.test/debian")
    with pytest.raises(SetupError, match="Not a directory"):
        packages.ensure("set", package_set, options)


def test_a_full_disk_is_told_with_a_hint() -> None:
    error = product.disk_error(OSError(28, os.strerror(28)), Path("/cache/x"))
    assert str(error) == "/cache/x: No space left on device"
    assert "TESTBED_CACHE_DIR" in error.hint
