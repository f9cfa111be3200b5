# SPDX-License-Identifier: Apache-2.0
"""Saved machines: what they are named after, how they are kept, and what is never used."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.errors import (
    HostError,
    LaunchError,
    LinkLost,
    QmpError,
    RackGone,
    SetupError,
    TestbedError,
)
from testbed.machine import argv, saving
from testbed.machine.ahead import AnotherRack
from testbed.machine.command import MACHINE_STATE, LaunchContext, NodeCommand, Start
from testbed.topology import load, placement
from testbed.warm import memory, restore
from testbed.warm import store as warm_store
from testbed.warm.store import FORMAT, INDEX, MEMORY, STATE, Snapshot, Store

ROOT = Path(__file__).resolve().parents[2]
BLOCK = memory.BLOCK_BYTES


def make_within(store: Store, key: str, data: bytes = b"\1" * BLOCK) -> None:
    """The same, by who is the only one to make it."""
    with store.making(key) as partial:
        runs = memory.pack(data, partial / MEMORY)
        (partial / STATE).write_bytes(b"state of " + key.encode())
        store.describe(partial, runs, "node")


def make(store: Store, key: str, data: bytes = b"\1" * BLOCK) -> Snapshot:
    """One entry, as a save makes it."""
    with store.exclusive(key):
        make_within(store, key, data)
    found = store.find(key)
    assert found is not None
    return found


@settings(max_examples=30, deadline=None)
@given(blocks=st.lists(st.sampled_from([0, 0, 0, 1, 255]), max_size=12), tail=st.integers(0, 9))
def test_memory_is_in_the_file_as_it_was_and_zeros_take_no_room(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[int], tail: int
) -> None:
    data = b"".join(bytes([value]) * BLOCK for value in blocks) + b"\7" * tail
    packed = tmp_path_factory.mktemp("packed") / "memory"
    runs = memory.pack(data, packed)
    assert packed.read_bytes() == data
    assert sum(length for _, length in runs) == len(data) - BLOCK * blocks.count(0)
    opened = memory.OpenMemory(packed)
    wanted = xxhash.xxh3_128_hexdigest(data.replace(b"\0", b""))
    assert memory.checksum(opened.fd, runs, len(data)) == wanted
    assert memory.checksum(opened.fd, runs, len(data) + 1) == ""


@pytest.mark.parametrize("holes", [True, False])
def test_what_stands_where_nothing_was_is_damage(tmp_path: Path, *, holes: bool) -> None:
    data = b"\1" * BLOCK + bytes(2 * BLOCK) + b"\2" * BLOCK
    packed = tmp_path / "memory"
    runs = memory.pack(data, packed)
    if not holes:  # as on a filesystem that has none
        packed.write_bytes(data)
    opened = memory.OpenMemory(packed)
    sound = memory.checksum(opened.fd, runs, len(data))
    assert sound == xxhash.xxh3_128_hexdigest(data.replace(b"\0", b""))
    with packed.open("r+b") as file:
        file.seek(2 * BLOCK + 5)
        file.write(b"\1")
    assert memory.checksum(opened.fd, runs, len(data)) == ""


@pytest.mark.parametrize("name", [INDEX, STATE])
def test_an_entry_that_a_host_cannot_open_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store = Store(tmp_path)
    make(store, "a")
    read = Path.read_bytes

    def none_is_free(path: Path) -> bytes:
        if path.name == name:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", none_is_free)
        with pytest.raises(HostError, match=f"{name}: Too many open files"):
            store.find("a")
    assert store.find("a") is not None


def test_a_block_may_begin_with_a_hole(tmp_path: Path) -> None:
    data = bytes(BLOCK) + bytes(BLOCK // 2) + b"\1" * (BLOCK // 2) + bytes(BLOCK)
    packed = tmp_path / "memory"
    runs = memory.pack(data, packed)
    opened = memory.OpenMemory(packed)
    sound = memory.checksum(opened.fd, runs, len(data))
    packed.unlink()
    with packed.open("wb") as file:  # as `cp --sparse=always` makes it
        file.seek(BLOCK + BLOCK // 2)
        file.write(b"\1" * (BLOCK // 2))
        file.truncate(len(data))
    opened = memory.OpenMemory(packed)
    assert memory.checksum(opened.fd, runs, len(data)) == sound


def test_an_entry_that_is_removed_stays_what_it_is_for_who_has_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    found = make(store, "a")
    store.discard("a")
    assert Path(found.memory.place).read_bytes() == b"\1" * BLOCK


def test_an_entry_is_found_whole_and_is_nobody_elses(tmp_path: Path) -> None:
    store = Store(tmp_path / "warm")
    assert store.find("a") is None
    found = make(store, "a")
    assert found.damage() == ""
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(found.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in found.folder.iterdir()} == {0o600}


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in (MEMORY, STATE) for how in ("flip", "cut", "gone")],
)
def test_a_damaged_file_is_noticed(tmp_path: Path, name: str, how: str) -> None:
    store = Store(tmp_path)
    path = make(store, "a").folder / name
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    found = store.find("a")
    assert (found is None) is (how == "gone")
    assert found is None or str(path) in found.damage()


def test_what_is_damaged_after_it_was_found_is_noticed_or_not_used(tmp_path: Path) -> None:
    found = make(Store(tmp_path), "a")
    (found.folder / STATE).write_bytes(b"another")
    assert found.damage() == ""
    assert found.state == b"state of a"
    os.truncate(found.folder / MEMORY, BLOCK - 1)
    assert "memory is not as it was written" in found.damage()


def test_what_was_used_when_the_clock_was_wrong_goes_before_what_was_used_since(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path, budget_bytes=2 * BLOCK + BLOCK // 2)
    now_s, year_s = time.time(), 365 * 86400
    for key, used_s in {"a": now_s + year_s, "b": now_s - year_s, "c": now_s + 2 * year_s}.items():
        os.utime(make(store, key).folder / INDEX, (used_s, used_s))
    assert [entry.key for entry in store.kept()] == ["b", "c", "a"]
    assert store.find("a") is not None, "used now"
    assert [entry.key for entry in store.prune()] == ["c"]


def test_an_index_that_was_touched_is_no_entry_and_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    index = make(store, "a").folder / INDEX
    index.write_text(index.read_text().replace(f'"format": {FORMAT}', '"format": 0'))
    assert store.find("a") is None
    assert not index.parent.exists()


def test_an_entry_that_another_makes_while_it_is_looked_for_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    read = warm_store._read_index

    def just_before(path: Path) -> Any:
        found = read(path)
        make_within(store, "a")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(warm_store, "_read_index", just_before)
        assert store.find("a") is None
    assert store.find("a") is not None


def _make_on_a_full_disk(store: Store) -> None:
    with store.exclusive("a"), store.making("a") as partial:
        (partial / MEMORY).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(partial / MEMORY))


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(SetupError, match="No space left"):
        _make_on_a_full_disk(store)
    assert store.find("a") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


def test_a_save_that_meets_the_disks_end_leaves_nothing(tmp_path: Path) -> None:
    # In a process of its own, whose files may have one block: the kernel refuses the second.
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from testbed.errors import SetupError\n"
        "from testbed.warm import memory, store\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({BLOCK}, {BLOCK}))\n"
        "kept = store.Store(Path(sys.argv[1]))\n"
        "try:\n"
        "    with kept.exclusive('a'), kept.making('a') as partial:\n"
        f"        memory.pack(b'1' * {3 * BLOCK}, partial / store.MEMORY)\n"
        "except SetupError as error:\n"
        "    print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


def test_two_who_want_the_same_machine_save_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = load.load(ROOT / "topologies" / "minimal.yaml", {})
    wanted = SimpleNamespace(
        plan=placement.place(topology).nodes["host0"],
        spec=topology.nodes["host0"],
        key="a",
        restoring=lambda: NodeCommand("host0", ()),
    )
    saves = []

    def save(store: Store, key: str, *_: object) -> None:
        saves.append(key)
        time.sleep(0.2)
        make_within(store, key)

    monkeypatch.setattr(restore, "store", lambda: Store(tmp_path))
    monkeypatch.setattr(restore, "_save", save)
    found: list[restore.Saved] = []

    def harness() -> None:
        every: Any = {"host0": wanted}
        found.append(restore.ready(every, tmp_path, 10.0, say=lambda _: None)["host0"])

    threads = [threading.Thread(target=harness) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert saves == ["a"]
    assert [each.snapshot.damage() for each in found] == [""] * 3


@pytest.mark.parametrize(
    ("number", "sound"), [(errno.ENOMEM, True), (errno.ENOSPC, True), (errno.EIO, False)]
)
def test_a_host_without_memory_is_not_the_saved_machines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, sound: bool
) -> None:
    found = make(Store(tmp_path), "a")

    def damage(_: Snapshot) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Snapshot, "damage", damage)
    with pytest.raises(restore.SnapshotUnfit, match=os.strerror(number)) as caught:
        restore.Checking(found).wait()
    assert caught.value.is_sound is sound


def test_a_machine_that_said_hello_is_nobodys_before_its_files_are_found_to_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make(Store(tmp_path), "a")
    os.truncate(found.folder / MEMORY, BLOCK - 1)
    check, told = Snapshot.damage, []

    def slowly(snapshot: Snapshot) -> str:
        time.sleep(0.1)
        return check(snapshot)

    monkeypatch.setattr(Snapshot, "damage", slowly)
    monkeypatch.setattr(saving, "await_running", lambda *_: None)
    node: Any = SimpleNamespace(
        name="host0",
        folder=tmp_path,
        watch=SimpleNamespace(check=lambda: None),
        introduce=lambda messages, _: told.extend(messages),
    )
    keys: Any = SimpleNamespace(host_private=b"private", client_public="public")
    with pytest.raises(restore.SnapshotUnfit, match="not as it was written"):
        restore._resume(node, found, lambda: keys, 10.0, disks=True)
    assert told, "it had been told who it is"


def test_a_rack_that_was_ended_is_not_booted_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make(Store(tmp_path), "a")

    def ended(*_: Any) -> None:
        raise RackGone("the rack 'r' is gone: asked to", node="r")

    monkeypatch.setattr(saving, "await_running", ended)
    node: Any = SimpleNamespace(
        name="host0", folder=tmp_path, watch=SimpleNamespace(check=lambda: None)
    )
    keys: Any = None
    with pytest.raises(RackGone):
        restore._resume(node, found, keys, 10.0, disks=True)


def test_what_was_found_is_restored_although_it_was_pruned(tmp_path: Path) -> None:
    store = Store(tmp_path / "warm")
    found = make(store, "a")
    store.prune(0)
    assert not found.folder.exists()
    restore.provide_state(found, tmp_path)
    assert (tmp_path / MACHINE_STATE).read_bytes() == b"state of a"
    restore.provide_state(found, tmp_path)  # as where it was started ahead
    (tmp_path / MACHINE_STATE).write_bytes(b"state of b")
    with pytest.raises(AnotherRack):
        restore.provide_state(found, tmp_path)
    assert found.damage() == ""


@pytest.mark.parametrize(
    ("error", "sound"),
    [
        (
            LaunchError(
                "n: QEMU ended with status 1",
                node="n",
                exit_status=1,
                command=(),
                output="qemu: warning\nqemu: Cannot allocate memory\n",
            ),
            True,
        ),
        (
            LaunchError(
                "n: QEMU ended with status 1",
                node="n",
                exit_status=1,
                command=(),
                output="qemu: load of migration failed: Input/output error\n",
            ),
            False,
        ),
        (LinkLost("n: QEMU was killed", node="n", exit_status=-signal.SIGKILL), True),
        (LinkLost("n: QEMU was killed", node="n", exit_status=-signal.SIGBUS), False),
        (LinkLost("n: no answer", node="n"), False),
        (HostError("n: its state took longer than 20 s"), True),
        (QmpError("n: refused", error_class="GenericError", description="x"), False),
    ],
)
def test_what_only_the_host_can_have_done_is_not_the_saved_machines_fault(
    error: TestbedError, *, sound: bool
) -> None:
    unfit = restore._unfit(error, "a")
    assert unfit.is_sound is sound
    assert unfit.message.startswith(error.message)
    if isinstance(error, LaunchError):
        assert error.output.splitlines()[-1] in unfit.message


def test_what_a_killed_save_left_is_removed_but_not_what_is_being_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    left, making = tmp_path / ".a.1", tmp_path / ".b.2"
    for partial in (left, making):
        partial.mkdir()
    with store.exclusive("b"):
        store.prune()
        assert making.exists()
    assert not left.exists()
    assert store.kept() == []


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path, budget_bytes=3 * BLOCK)
    for number, key in enumerate("abc"):
        os.utime(make(store, key).folder / INDEX, (1000 + number, 1000 + number))
    assert store.find("a") is not None  # used just now
    assert [entry.key for entry in store.prune()] == ["b"]
    assert [entry.key for entry in store.kept()] == ["a", "c"]
    assert [entry.key for entry in store.prune(0)] == ["a", "c"]


def test_what_goes_on_are_bridges_the_control_network_and_the_iommu() -> None:
    topology = load.load(ROOT / "topologies" / "quad-gpu.yaml", {})
    plan = placement.place(topology).nodes["host0"]
    kept = {f.kind for f in plan.functions} - {f.kind for f in saving.reset(plan)}
    assert kept == {"port", "virtio-net"}


def test_a_restored_machine_cannot_write_what_was_saved() -> None:
    topology = load.load(ROOT / "topologies" / "minimal.yaml", {})
    plan, spec = placement.place(topology).nodes["host0"], topology.nodes["host0"]
    for start, wanted in ((Start.SAVE, (True, None)), (Start.RESTORE, (False, True))):
        context = LaunchContext(("qemu",), {}, "tcg", Path("kernel"), Path("initrd"), start=start)
        words = argv.command(plan, spec, context).argv
        (ram,) = (json.loads(word) for word in words if '"id":"ram0"' in word)
        assert (ram["share"], ram.get("readonly")) == wanted


def test_a_machine_that_cannot_be_saved_has_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "amd.yaml"
    file.write_text("rack: r\nnodes:\n  n: {iommu: {kind: amd}, kernel: generic, pcie: []}\n")
    topology = load.load(file, {})
    plan = placement.place(topology).nodes["n"]
    assert "AMD" in saving.why_not(plan, topology.nodes["n"])
