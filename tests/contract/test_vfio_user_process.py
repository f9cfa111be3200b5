# SPDX-License-Identifier: Apache-2.0
"""The model process: its sockets and its control."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import InputError
from testbed.models import registers as hw
from testbed.models import wire
from testbed.models.spec import parse
from testbed.models.wire import Command
from tests.contract.model_process import (
    TIMEOUT_S,
    Process,
    Vfio,
    names,
    serving,
    ticks,
)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One for all that changes nothing."""
    with serving(tmp_path_factory.mktemp("models")) as process:
        yield process


def test_ready_means_that_every_socket_is_there(process: Process) -> None:
    assert process.first == {"ready": True, "pids": process.pids}
    assert list(process.pids) == ["gpu0", "gpu1", "nic0"]
    assert all(Path(f"/proc/{pid}").is_dir() for pid in process.pids.values())
    assert names(process.folder) == {
        "control.sock", "gpu0.vfu", "gpu1.vfu", "nic0.vfu", "nic0.wire", "link",
    }  # fmt: skip
    for name, identity in (("gpu0", hw.GPU_IDENTITY), ("nic0", hw.NIC_IDENTITY)):
        with process.connect(f"{name}.vfu") as connection:
            assert Vfio(connection).read(hw.Common.IDENTITY) == identity


def test_the_links_of_one_node_come_up(process: Process) -> None:
    with process.connect("gpu0.vfu") as one, process.connect("gpu1.vfu") as two:
        gpus = [Vfio(one), Vfio(two)]
        deadline = time.monotonic() + TIMEOUT_S
        while {gpu.read(hw.LINK_BASE + hw.Link.STATE) for gpu in gpus} != {hw.LinkState.UP}:
            assert time.monotonic() < deadline
        assert process.call("link", device="gpu0", peer="gpu1", up=False)["state"] == "down"
        assert process.call("link", device="gpu0", peer="gpu1", latency_s=0.5) == {
            "state": "down", "width": 16, "bytes_per_s": 0.0, "latency_s": 0.5,
        }  # fmt: skip


def test_the_end_of_its_owner_is_its_end(process: Process) -> None:
    status, error = process.end()
    assert (status, error) == (0, "")
    assert names(process.folder) == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_in_good_order(process: Process, number: int) -> None:
    with process.connect("gpu0.vfu") as connection:
        client = Vfio(connection)
        process.popen.send_signal(number)
        process.popen.wait(TIMEOUT_S)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.read(0)
    assert process.popen.returncode == 0
    assert names(process.folder) == set()


def test_idle_it_uses_no_cpu(process: Process) -> None:
    with process.connect("gpu0.vfu") as connection:
        Vfio(connection).read(0)
        time.sleep(0.3)
        pids = (process.popen.pid, *process.pids.values())
        before = [ticks(pid) for pid in pids]
        time.sleep(1.0)
        assert [ticks(pid) for pid in pids] == before


def test_a_second_machine_waits_for_the_first_to_go(process: Process) -> None:
    first = process.connect("gpu0.vfu")
    Vfio(first)
    with process.connect("gpu0.vfu") as second:
        second.sendall(wire.encode_header(1, Command.VERSION, 4) + bytes(4))
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.recv(1)
        first.close()
        second.settimeout(TIMEOUT_S)
        assert second.recv(16)


class TestControl:
    def test_devices(self, process: Process) -> None:
        with process.connect("gpu1.vfu") as connection:
            Vfio(connection)
            devices = {item["device"]: item for item in process.call("devices")}
        assert {name: item["connected"] for name, item in devices.items()} == {
            "gpu0": False,
            "gpu1": True,
            "nic0": False,
        }
        assert devices["gpu0"]["failure"] is None

    def test_witness(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as connection:
            client = Vfio(connection)
            client.write(hw.Common.DOORBELL_NOTIFY, 5)
            assert process.call("counters", device="gpu0")["events"]["doorbells"] == 1
            (last,) = process.call("trace", device="gpu0")[-1:]
            assert (last["what"], last["address"]) == ("doorbells", 5)
            assert process.call("trace", device="gpu0", after=last["sequence"]) == []
            process.call("reset_trace", device="gpu0")
            assert process.call("counters", device="gpu0")["events"]["doorbells"] == 0
            assert process.call("mappings", device="gpu0") == []

    def test_faults(self, process: Process) -> None:
        rule = {"name": "r", "action": "drop", "write": True}
        process.call("inject", device="gpu0", rule=rule)
        assert process.call("rules", device="gpu0") == [{"name": "r", "seen": 0, "struck": 0}]
        process.call("clear", device="gpu0", name="r")
        process.call("inject", device="gpu0", rule=rule)
        process.call("clear", device="gpu0")
        assert process.call("rules", device="gpu0") == []
        process.call("stick", device="gpu0", on=True)
        process.call("lose", device="gpu0", what="doorbell", count=1)
        process.call("lose", device="nic0", what="interrupt", count=2)
        with process.connect("gpu0.vfu") as connection:
            client = Vfio(connection)
            client.write(hw.Common.DOORBELL_NOTIFY, 5)
            assert client.read(hw.Common.NOTIFIED) == 0

    def test_surprise_removal(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as connection:
            client = Vfio(connection)
            process.call("remove", device="gpu0")
            assert client.read(0) == 0xFFFFFFFF
            with process.connect("gpu1.vfu") as other:
                assert Vfio(other).read(0) == hw.GPU_IDENTITY
        with process.connect("gpu0.vfu") as connection:  # plugged in again
            assert Vfio(connection).read(0) == hw.GPU_IDENTITY

    @pytest.mark.parametrize(
        ("method", "params", "words"),
        [
            ("explode", {}, "no method 'explode'"),
            ("__init__", {}, "no method"),
            ("counters", {}, "'device'"),
            ("counters", {"device": "gpu9"}, "no device 'gpu9'"),
            ("trace", {"device": "gpu0", "after": "x"}, "'after'"),
            ("inject", {"device": "gpu0"}, "a rule is an object"),
            ("clear", {"device": "gpu0", "name": "r"}, "no rule 'r'"),
            ("stick", {"device": "gpu0", "on": 1}, "'on'"),
            ("lose", {"device": "gpu0", "what": "hope", "count": 1}, "'what'"),
            ("lose", {"device": "gpu0", "what": "doorbell", "count": -1}, "'count'"),
            ("link", {"device": "nic0", "peer": "gpu0"}, "no links"),
            ("link", {"device": "gpu0", "peer": "gpu7"}, "no link to 'gpu7'"),
            ("link", {"device": "gpu0", "peer": "gpu1", "latency_s": -1}, "latency_s"),
            ("routes", {}, "'device'"),
            ("routes", {"device": "gpu9"}, "no device 'gpu9'"),
            ("routes", {"device": "gpu0"}, "names no machine"),
            ("tree", {}, "names no machine"),
            ("register", {"device": "gpu0", "bar": 0, "offset": 0}, "no method 'register'"),
            ("remove", {"device": "gpu0"}, "no machine has 'gpu0'"),
        ],
    )
    def test_what_cannot_be(
        self, untouched: Process, method: str, params: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(InputError, match=words):
            untouched.call(method, **params)

    @pytest.mark.parametrize(
        "line", [b"\n", b"[]\n", b"{\n", b'{"params": 1}\n', b"[" * 9999 + b"\n"]
    )
    def test_garbage_is_answered(self, untouched: Process, line: bytes) -> None:
        with untouched.connect("control.sock") as connection, connection.makefile("rwb") as file:
            file.write(line)
            file.flush()
            assert "error" in json.loads(file.readline())
            file.write(b'{"id": 1, "method": "devices"}\n')
            file.flush()
            assert len(json.loads(file.readline())["result"]) == 3


def test_names_are_used_once() -> None:
    device = {"name": "a", "kind": "nic", "socket": "a.vfu"}
    for other, words in (
        ({**device, "socket": "b.vfu"}, "device 'a'"),
        ({**device, "name": "b"}, "socket 'a.vfu'"),
    ):
        with pytest.raises(InputError, match=words):
            parse({"control": "c", "devices": [device, other]})
    with pytest.raises(InputError, match="no memory 'm'"):
        parse({"control": "c", "devices": [{**device, "memory": "m"}]})
    with pytest.raises(InputError, match="'peers'"):
        parse({"control": "c", "devices": [{**device, "peers": {"x": "y"}}]})
