# SPDX-License-Identifier: Apache-2.0
"""Waiting for what Linux reports of faults: no longer than it can still come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from guest_agent.agent import Agent
from guest_agent.rpc import ParameterError
from tests.unit.agent.test_agent_kmsg import Device

STATUS = "DMAR: DRHD: handling fault status reg 2"
FAULT = "DMAR: [DMA Write NO_PASID] Request device [05:00.1] fault addr 0x1000 [fault reason 0x05]"
LONG_S = 10.0


class Reports(Device):
    """A kernel that reports faults now, on the clock of its log."""

    def fault(self, number: int) -> None:
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        for each, text in ((number, STATUS), (number + 1, FAULT)):
            self._writer.send(f"3,{each},{now_us},-;{text}\n".encode())


@pytest.fixture
def kernel() -> Iterator[Reports]:
    kernel = Reports()
    yield kernel
    kernel.close()


def since(kernel: Reports, wanted: int, wait_s: float) -> tuple[int, float]:
    """How many faults it says there are, and after how many seconds."""
    agent = Agent()
    agent._log_made = kernel.log
    began_s = time.monotonic()
    answer = agent._faults_since(sequence=0, wanted=wanted, wait_s=wait_s)
    return len(answer["records"]), time.monotonic() - began_s


def test_what_is_there_is_not_waited_for(kernel: Reports) -> None:
    kernel.fault(1)
    found, took_s = since(kernel, 1, LONG_S)
    assert found == 1
    assert took_s < LONG_S / 2


def test_a_report_that_comes_later_is_waited_for(kernel: Reports) -> None:
    kernel.fault(1)
    later = threading.Timer(0.1, kernel.fault, [3])
    later.start()
    found, took_s = since(kernel, 2, LONG_S)
    later.join()
    assert found == 2
    assert 0.05 < took_s < LONG_S / 2


def test_one_that_does_not_come_is_waited_for_so_long(kernel: Reports) -> None:
    kernel.fault(1)
    found, took_s = since(kernel, 2, 0.2)
    assert found == 1
    assert 0.2 <= took_s < LONG_S / 2


def test_a_kernel_that_has_fallen_silent_is_not_waited_for(kernel: Reports) -> None:
    for number in (1, 3, 5):  # 9 of the 10 lines that it prints in 5 s
        kernel.fault(number)
    found, took_s = since(kernel, 4, LONG_S)
    assert found == 3
    assert took_s < LONG_S / 2


def test_nobody_waits_for_ever(kernel: Reports) -> None:
    with pytest.raises(ParameterError, match="wait_s"):
        since(kernel, 1, 1e9)
