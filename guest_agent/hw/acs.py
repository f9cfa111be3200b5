# SPDX-License-Identifier: Apache-2.0
"""Access Control Services of a port, changed while the machine runs, as setpci(8) would."""

from __future__ import annotations

import os

from guest_agent import sysfs
from guest_agent.observe import pci
from guest_agent.rpc import ParameterError

_CONTROL_OFFSET = 6


def set_control(bdf: str, control: int) -> int:
    """Write the ACS control register; returns what it held. The kernel is not told.

    :raises ParameterError: the function has no ACS, or the register no such bits.
    """
    path = f"{sysfs.ROOT}/bus/pci/devices/{bdf}/config"
    with pci.ConfigSpace(path) as config:
        found = pci.acs(config)
    if found is None:
        raise ParameterError(f"device: {bdf} has no ACS capability")
    if control & ~0x7F:
        raise ParameterError(f"control: {control:#x} has more than the seven bits of ACS")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, control.to_bytes(2, "little"), found["offset"] + _CONTROL_OFFSET)
    finally:
        os.close(fd)
    held: int = found["control"]
    return held
