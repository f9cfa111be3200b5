# SPDX-License-Identifier: Apache-2.0
"""Every way to a model process's end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from testbed.errors import ExitCode, InputError
from testbed.models import registers as hw
from testbed.models import wire
from testbed.models.wire import Command
from tests.contract.model_process import (
    TIMEOUT_S,
    Process,
    Vfio,
    names,
    runs,
    ticks,
    wait_for,
)

HANGING = """
import time
from testbed.models.config import Bar, Identity
from testbed.models.device import Device

class Hanging(Device):
    identity = Identity(0x1234, 1, 0xFF0000)
    bars = (Bar(0, 4096),)

    def read(self, bar, offset, size):
        time.sleep(60)
"""


class TestDeath:
    """A machine does not survive a connection that is reset, so the connections live on."""

    def test_the_devices_answer_as_an_empty_slot_does(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as one, process.connect("nic0.vfu") as two:
            client, other = Vfio(one), Vfio(two)
            os.kill(process.pids["gpu0"], signal.SIGKILL)
            assert process.popen.stdout is not None
            # What is asked before the death is noticed is answered with an error.
            lost = json.loads(process.popen.stdout.readline())
            assert client.read(hw.Common.IDENTITY) == 0xFFFFFFFF
            client.write(hw.Common.CONTROL, 1)
            assert client.read(hw.Common.CONTROL) == 0xFFFFFFFF
            assert lost == {"lost": "gpu0", "status": 256 + signal.SIGKILL}
            assert other.read(hw.Common.IDENTITY) == hw.NIC_IDENTITY
            with pytest.raises(InputError, match="device 'gpu0' is lost: its model died"):
                process.call("counters", device="gpu0")
            devices = {item["device"]: item for item in process.call("devices")}
            assert devices["gpu0"]["lost"] == 256 + signal.SIGKILL
            assert devices["nic0"]["lost"] is None
            status, said = process.end()
        assert status == ExitCode.ERROR
        assert "device gpu0: its model died" in said
        assert names(process.folder) <= {"gpu0.vfu", "link"}

    def test_what_was_asked_before_is_answered(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as connection:
            client = Vfio(connection)
            os.kill(process.pids["gpu0"], signal.SIGSTOP)
            access = wire.REGION_ACCESS.encode(wire.RegionAccess(0, 0, 4))
            connection.sendall(wire.encode_header(5, Command.REGION_READ, 16) + access)
            os.kill(process.pids["gpu0"], signal.SIGKILL)
            answer = wire.HEADER.decode(client.receive(16))
            if answer.message_id != 5:  # it was stopped just after it had answered this one
                assert answer.size == 16
                answer = wire.HEADER.decode(client.receive(16))
            assert answer.message_id == 5
            assert client.receive(20)[-4:] == b"\xff" * 4

    @pytest.mark.parametrize("received", [0, 7, 16])
    def test_what_was_under_way_fails_at_once(self, tmp_path: Path, received: int) -> None:
        """Killed with a part of a read received, or while it is being answered."""
        (tmp_path / "card.py").write_text(HANGING)
        device = {"name": "mine", "socket": str(tmp_path / "mine.vfu")}
        device["kind"] = f"{tmp_path}/card.py:Hanging"
        spec = {"control": str(tmp_path / "control.sock"), "devices": [device]}
        process = Process(tmp_path, spec, "--trust")
        access = wire.REGION_ACCESS.encode(wire.RegionAccess(0, 0, 4))
        with process.connect("mine.vfu") as connection:
            client = Vfio(connection)
            connection.sendall(wire.encode_header(5, Command.REGION_READ, 16) + access[:received])
            time.sleep(0.3)  # until it hangs, or waits for the rest
            os.kill(process.pids["mine"], signal.SIGKILL)
            connection.sendall(access[received:])
            answer = wire.HEADER.decode(client.receive(16))
            assert answer.message_id == 5
            assert answer.flags & wire.HeaderFlag.ERROR
            assert answer.size == 16
            assert client.read(0) == 0xFFFFFFFF  # still in step
        process.end()

    def test_a_machine_that_has_gone_is_forgotten(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as connection:
            Vfio(connection)
        wait_for(lambda: not any(item["connected"] for item in process.call("devices")))
        os.kill(process.pids["gpu0"], signal.SIGKILL)
        assert process.popen.stdout is not None
        assert json.loads(process.popen.stdout.readline())["lost"] == "gpu0"

    def test_the_supervisor_s_death_is_the_models_end(self, process: Process) -> None:
        with process.connect("gpu0.vfu") as connection:
            client = Vfio(connection)
            process.popen.kill()
            connection.settimeout(TIMEOUT_S)
            assert client.socket.recv(1) == b""
        wait_for(lambda: not any(map(runs, process.pids.values())))

    def test_bereaved_it_uses_no_cpu(self, process: Process) -> None:
        os.kill(process.pids["gpu0"], signal.SIGKILL)
        assert process.popen.stdout is not None
        process.popen.stdout.readline()
        before = ticks(process.popen.pid)
        time.sleep(0.5)
        assert ticks(process.popen.pid) == before
