# SPDX-License-Identifier: Apache-2.0
"""Names and folders: who gets them when several want them, and who removes them."""

from __future__ import annotations

import fcntl
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from testbed.errors import HostError, InputError, NoSuchRack, RackNameInUse
from testbed.machine.children import remove_runtime_folder
from testbed.machine.rack_record import RackRecord
from testbed.machine.registry import (
    NEW_PREFIX,
    RackState,
    Reservation,
    clean,
    clean_folder,
    find,
    list_racks,
    reserve,
)
from testbed.rack_node import AccessKeys
from tests.contract.machine_fakes import run_python

RESERVER = """
import sys
from pathlib import Path
from testbed.errors import RackNameInUse
from testbed.machine.registry import reserve

try:
    reservation = reserve(Path(sys.argv[1]), "rack")
except RackNameInUse:
    print("in use", flush=True)
else:
    print("mine", flush=True)
    sys.stdin.read()
"""


def stale(base: Path, name: str = "rack") -> Path:
    """A folder as a killed keeper leaves it."""
    reservation = reserve(base, name)
    (reservation.folder / "host0").mkdir()
    (reservation.folder / "host0/log").symlink_to(base.parent)
    (reservation.folder / "keeper.sock").touch()
    reservation.hand_over()
    return reservation.folder


def locked(reservation: Reservation) -> bool:
    with (reservation.folder / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_name_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.machine.registry.BUSY_S", 0.1)
    with reserve(tmp_path, "rack") as first:
        with pytest.raises(RackNameInUse, match="a rack named 'rack' runs already") as caught:
            reserve(tmp_path, "rack")
        assert "testbed down rack" in caught.value.hint
        with reserve(tmp_path, "rack", unique=True) as second:
            assert second.name == "rack-2"
            with reserve(tmp_path, "rack", unique=True) as third:
                assert third.name == "rack-3"
        assert locked(first)
    assert list((tmp_path / "racks").iterdir()) == []


def test_another_process_has_the_name(tmp_path: Path) -> None:
    with run_python(RESERVER, str(tmp_path)) as one:
        assert one.stdout is not None
        with reserve(tmp_path, "other"):
            word = one.stdout.readline()
        assert word == "mine\n"
        one.wait(10)  # its input is empty: it ends without a word
    assert list_racks(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".new-x", "a/b", "a b", "-a", "a-", "x" * 41, "ä", "a\n"]
)
def test_impossible_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is no name for a rack"):
        reserve(tmp_path, name)
    with pytest.raises(NoSuchRack):
        find(tmp_path, name)


def test_no_rack(tmp_path: Path) -> None:
    assert list_racks(tmp_path / "nowhere") == []
    with pytest.raises(NoSuchRack, match="no rack named 'x' runs") as caught:
        find(tmp_path, "x")
    assert "testbed up" in caught.value.hint


def test_a_reserved_rack_is_listed_as_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("testbed.machine.registry.STATUS_TIMEOUT_S", 0.1)
    with reserve(tmp_path, "rack") as reservation:
        reservation.write_record(RackRecord("rack", tmp_path, ("host0",)))
        (info,) = list_racks(tmp_path)
        assert info.state is RackState.STARTING
        assert info.record is not None
        with pytest.raises(NoSuchRack) as caught:
            find(tmp_path, "rick")
        assert caught.value.hint == "there is: rack"


def test_stale_folders_are_cleaned_and_links_not_followed(tmp_path: Path) -> None:
    folder = stale(tmp_path / "base")
    assert list_racks(tmp_path / "base") == []
    assert not folder.exists()
    assert tmp_path.exists()


def test_half_made_and_half_removed_folders(tmp_path: Path) -> None:
    racks = tmp_path / "racks"
    old, new = racks / f"{NEW_PREFIX}a-1", racks / f"{NEW_PREFIX}b-1"
    for folder in (old, new, racks / ".gone-c-1", racks / ".gone-d-1"):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    with (racks / ".gone-d-1/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clean(tmp_path)
        assert sorted(path.name for path in racks.iterdir()) == [".gone-d-1", f"{NEW_PREFIX}b-1"]


def test_cleaners_and_reservers_race(tmp_path: Path) -> None:
    """Whoever reserves a stale name gets it, with a lock, whatever cleaners do meanwhile."""
    end_s = time.monotonic() + 1.5
    failures: list[BaseException] = []

    def clean_all() -> None:
        try:
            while time.monotonic() < end_s:
                clean(tmp_path)
        except BaseException as error:
            failures.append(error)

    cleaners = [threading.Thread(target=clean_all) for _ in range(2)]
    rounds = 0
    stale(tmp_path)
    for cleaner in cleaners:
        cleaner.start()
    while time.monotonic() < end_s and not failures:
        reservation = reserve(tmp_path, "rack")
        for _ in range(5):
            assert locked(reservation)
        (reservation.folder / "keeper.sock").touch()
        reservation.hand_over()  # dies: stale again
        rounds += 1
    for cleaner in cleaners:
        cleaner.join()
    assert not failures
    assert rounds > 1
    clean(tmp_path)
    assert list((tmp_path / "racks").iterdir()) == []


def test_a_cleaner_that_comes_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opened a stale lock; before it could take it, the name had a new owner."""
    folder = stale(tmp_path)
    flock = fcntl.flock
    new: list[Reservation] = []

    def late_flock(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        remove_runtime_folder(str(folder))
        new.append(reserve(tmp_path, "rack"))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late_flock)
    clean(tmp_path)
    assert new[0].folder == folder
    assert locked(new[0])
    new[0].release()


def test_a_cleaner_that_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It found the folder, but no lock; before it went on, the name had a new owner."""
    folder = stale(tmp_path)
    open_file = os.open
    new: list[Reservation] = []

    def late_open(path: Path, flags: int) -> int:
        monkeypatch.setattr(os, "open", open_file)
        remove_runtime_folder(str(folder))
        try:
            return open_file(path, flags)
        finally:
            new.append(reserve(tmp_path, "rack"))

    monkeypatch.setattr(os, "open", late_open)
    clean_folder(folder)
    assert locked(new[0])
    new[0].release()


def test_a_name_that_gets_free_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stale(tmp_path)
    rename = Path.rename

    def refused_at_first(self: Path, target: Path) -> Path:
        try:
            return rename(self, target)
        except OSError:
            remove_runtime_folder(str(folder))
            raise

    monkeypatch.setattr("testbed.machine.registry.clean", lambda _base: None)
    monkeypatch.setattr(Path, "rename", refused_at_first)
    with reserve(tmp_path, "rack") as reservation:
        assert locked(reservation)


def test_two_reservers_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.machine.registry.BUSY_S", 0.05)
    for _ in range(10):
        stale(tmp_path)
        got: list[Reservation] = []
        refused: list[RackNameInUse] = []
        both = threading.Barrier(2)

        def take(
            got: list[Reservation] = got,
            refused: list[RackNameInUse] = refused,
            both: threading.Barrier = both,
        ) -> None:
            both.wait()
            try:
                got.append(reserve(tmp_path, "rack"))
            except RackNameInUse as error:
                refused.append(error)

        takers = [threading.Thread(target=take) for _ in range(2)]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()
        assert (len(got), len(refused)) == (1, 1)
        assert locked(got[0])
        got[0].release()
    assert list((tmp_path / "racks").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "racks").touch()
    with pytest.raises(HostError, match=rf"{tmp_path}/racks: Not a directory"):
        reserve(tmp_path, "rack")


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    with reserve(tmp_path, "rack") as reservation:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        try:
            with pytest.raises(HostError, match=r"cannot write .*rack\.json: File too large"):
                reservation.write_record(RackRecord("rack", tmp_path, ()))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_record_survives_the_way_through_json(tmp_path: Path) -> None:
    record = RackRecord(
        "rack",
        tmp_path / "run",
        ("host0", "host1"),
        created_s=12.5,
        keys_file=tmp_path / "keys",
        topology={"rack": "x"},
        plan=[1, 2],
        versions={"qemu": "11.1"},
    )
    assert RackRecord.from_json(record.to_json()) == record
    with pytest.raises(HostError, match="another version"):
        RackRecord.from_json(record.to_json() | {"version": 99})


def test_keys_that_cannot_be_written_are_the_hosts_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot write .*/gone/keys\.json: No such file"):
        AccessKeys("client", "host").write(tmp_path / "gone" / "keys.json")
    file = tmp_path / "keys.json"
    AccessKeys("client", "host").write(file)
    assert AccessKeys.read(file) == AccessKeys("client", "host")
    assert file.stat().st_mode & 0o777 == 0o600
