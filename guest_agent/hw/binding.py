# SPDX-License-Identifier: Apache-2.0
"""Which driver owns a PCI function: taken over through ``driver_override``, and given back."""

from __future__ import annotations

import errno
import os

from guest_agent import sysfs
from guest_agent.rpc import ParameterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

VFIO_DRIVER = "vfio-pci"


class Binding:
    """One function taken from its driver, until :meth:`restore`.

    :param driver: who shall own it now; "" for nobody.
    :raises OSError: ENODEV: there is no such function; EBUSY: it carries this machine's network;
        ENOENT: the driver is not loaded, or it refused the function.
    """

    def __init__(self, bdf: str, driver: str, root: str = sysfs.ROOT) -> None:
        self.bdf = bdf
        self._bus = f"{root}/bus/pci"
        self._folder = f"{self._bus}/devices/{bdf}"
        if not sysfs.names(self._folder):
            raise OSError(errno.ENODEV, f"there is no PCI function {bdf}")
        self._previous = self.driver()
        # The kernel shows an unset override as "(null)", and an empty write unsets it.
        self._override = sysfs.read(f"{self._folder}/driver_override").replace("(null)", "")
        self._changed = False
        if self._previous == driver:
            return
        self._refuse_network()
        self._changed = True
        try:
            self._own(driver, driver)
        except OSError:
            self.restore()
            raise

    def driver(self) -> str:
        """The driver that owns the function now, or ""."""
        return sysfs.link_name(f"{self._folder}/driver")

    def restore(self) -> None:
        """Give the function back to the driver that had it. Idempotent.

        One that was pulled out meanwhile is nobody's. :raises OSError: it could not be given back.
        """
        if self._changed:
            self._changed = False
            try:
                self._own(self._previous, self._override)
            except OSError:
                if sysfs.names(self._folder):
                    raise

    def _own(self, driver: str, override: str) -> None:
        sysfs.write(f"{self._folder}/driver_override", (driver or override) + "\n")
        if self.driver():
            sysfs.write(f"{self._folder}/driver/unbind", self.bdf)
        if driver:
            if not sysfs.names(f"{self._bus}/drivers/{driver}"):
                raise OSError(errno.ENOENT, f"the driver {driver} is not loaded")
            sysfs.write(f"{self._bus}/drivers_probe", self.bdf)
            if self.driver() != driver:
                raise OSError(errno.ENOENT, f"{driver} did not take {self.bdf}")
        if driver and override != driver:
            sysfs.write(f"{self._folder}/driver_override", override + "\n")

    def _refuse_network(self) -> None:
        folders = [self._folder]
        folders += [
            f"{self._folder}/{name}"
            for name in sysfs.names(self._folder)
            if name.startswith("virtio")
        ]
        for folder in folders:
            for interface in sysfs.names(f"{folder}/net"):
                if sysfs.read_or(f"{folder}/net/{interface}/operstate", "") == "up":
                    raise OSError(
                        errno.EBUSY, f"{self.bdf} is {interface}, which this machine is reached by"
                    )


class Bindings:
    """Functions taken from their drivers, by name."""

    def __init__(self) -> None:
        self._held: dict[str, Binding] = {}

    def take(self, bdf: str, driver: str) -> bool:
        """Let a driver have a function; False if it is taken already. Errors as Binding."""
        if bdf in self._held:
            return False
        self._held[bdf] = Binding(bdf, driver)
        return True

    def give_back(self, bdf: str) -> bool:
        """To the driver that had it; False if it was not taken. Raises OSError as restore."""
        if bdf not in self._held:
            return False
        self._held.pop(bdf).restore()
        return True

    def close(self) -> None:
        """Give all back, the latest first."""
        while self._held:
            self._held.popitem()[1].restore()


def endpoints(group: str, root: str = sysfs.ROOT) -> list[str]:
    """The functions of an IOMMU group that VFIO must own: all but the bridges."""
    found = []
    for bdf in sysfs.names(f"{root}/kernel/iommu_groups/{group}/devices"):
        fd = os.open(f"{root}/bus/pci/devices/{bdf}/config", os.O_RDONLY | os.O_CLOEXEC)
        try:
            header_type = os.pread(fd, 1, 0x0E)[0] & 0x7F
        finally:
            os.close(fd)
        if header_type == 0:
            found.append(bdf)
    return found


def check_names(bdfs: list[str]) -> None:
    """:raises ParameterError: no functions are named, or one twice."""
    if not bdfs or len(set(bdfs)) != len(bdfs):
        raise ParameterError("devices: name at least one function, each once")


def check_free(bdfs: list[str], held: Collection[str]) -> None:
    """Unbinding a function that is open would wait for its closing, for ever.

    :raises OSError: EBUSY: one of ``bdfs`` is among those ``held``.
    """
    for bdf in bdfs:
        if bdf in held:
            raise OSError(errno.EBUSY, f"{bdf} is open already")


def restore(bindings: list[Binding]) -> list[str]:
    """Give functions back to their drivers, last first; empties the list.

    :raises OSError: the first that failed, after all were tried.
    """
    restored: list[str] = []
    failure: OSError | None = None
    while bindings:
        binding = bindings.pop()
        try:
            binding.restore()
            restored.append(binding.bdf)
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return restored[::-1]
