# SPDX-License-Identifier: Apache-2.0
"""Taking functions from their drivers and giving them back, against a small kernel."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from guest_agent import sysfs as sysfs_module
from guest_agent.hw import binding
from guest_agent.hw.binding import Binding, check_free, endpoints, restore
from tests.unit.agent.fake_sysfs import FakeSysfs, config_space

BDF = "0000:05:00.0"


class Kernel(FakeSysfs):
    """Does what a real one does when driver_override, unbind and drivers_probe are written."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root)
        self.refuses: set[str] = set()
        self.matches: dict[str, str] = {}
        monkeypatch.setattr(sysfs_module, "write", self.write)

    def write(self, path: str, text: str) -> None:
        name = path.rpartition("/")[2]
        if name == "driver_override":
            Path(path).write_text(text.strip() + "\n" if text.strip() else "(null)\n")
        elif name == "unbind":
            (self.devices / text / "driver").unlink()
        elif name == "drivers_probe":
            override = (self.devices / text / "driver_override").read_text().strip()
            driver = self.matches.get(text, "") if override == "(null)" else override
            if driver and driver not in self.refuses:
                self.bind(text, driver)

    def owner(self, bdf: str = BDF) -> str:
        return sysfs_module.link_name(str(self.devices / bdf / "driver"))

    def override(self, bdf: str = BDF) -> str:
        return (self.devices / bdf / "driver_override").read_text().strip()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path, monkeypatch)
    kernel.driver("vfio-pci")
    kernel.function(BDF, config_space(), group=1)
    return kernel


def test_a_function_with_a_driver_comes_back_to_it(kernel: Kernel) -> None:
    kernel.bind(BDF, "igb")
    taken = Binding(BDF, "vfio-pci", str(kernel.root))
    assert kernel.owner() == "vfio-pci"
    taken.restore()
    assert (kernel.owner(), kernel.override()) == ("igb", "(null)")


def test_a_driverless_function_is_driverless_again(kernel: Kernel) -> None:
    taken = Binding(BDF, "vfio-pci", str(kernel.root))
    taken.restore()
    assert (kernel.owner(), kernel.override()) == ("", "(null)")


def test_an_override_that_was_there_is_kept(kernel: Kernel) -> None:
    kernel.write(str(kernel.devices / BDF / "driver_override"), "mine")
    taken = Binding(BDF, "vfio-pci", str(kernel.root))
    taken.restore()
    assert kernel.override() == "mine"


def test_taken_for_nobody_and_back(kernel: Kernel) -> None:
    kernel.bind(BDF, "igb")
    taken = Binding(BDF, "", str(kernel.root))
    assert kernel.owner() == ""
    taken.restore()
    taken.restore()
    assert kernel.owner() == "igb"


def test_what_is_owned_already_is_left_alone(kernel: Kernel) -> None:
    kernel.bind(BDF, "vfio-pci")
    Binding(BDF, "vfio-pci", str(kernel.root)).restore()
    assert kernel.owner() == "vfio-pci"


@pytest.mark.parametrize("obstacle", ["refused", "not loaded"])
def test_a_failure_gives_the_function_back(kernel: Kernel, obstacle: str) -> None:
    kernel.bind(BDF, "igb")
    if obstacle == "refused":
        kernel.refuses.add("vfio-pci")
    driver = "vfio-pci" if obstacle == "refused" else "other"
    with pytest.raises(OSError, match=driver) as caught:
        Binding(BDF, driver, str(kernel.root))
    assert caught.value.errno == errno.ENOENT
    assert (kernel.owner(), kernel.override()) == ("igb", "(null)")


def test_a_function_that_is_not_there(kernel: Kernel) -> None:
    with pytest.raises(OSError, match="no PCI function") as caught:
        Binding("0000:77:00.0", "vfio-pci", str(kernel.root))
    assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize("place", ["net", "virtio0/net"])
def test_the_machines_network_is_not_taken(kernel: Kernel, place: str) -> None:
    kernel.bind(BDF, "virtio-pci")
    interface = kernel.devices / BDF / place / "eth0"
    interface.mkdir(parents=True)
    (interface / "operstate").write_text("down\n")
    Binding(BDF, "vfio-pci", str(kernel.root)).restore()
    (interface / "operstate").write_text("up\n")
    with pytest.raises(OSError, match="eth0") as caught:
        Binding(BDF, "vfio-pci", str(kernel.root))
    assert caught.value.errno == errno.EBUSY
    assert kernel.owner() == "virtio-pci"


def test_all_are_tried_and_the_first_failure_is_told(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bdfs = [BDF, "0000:06:00.0", "0000:07:00.0"]
    for bdf in bdfs[1:]:
        kernel.function(bdf, config_space())
    taken = [Binding(bdf, "vfio-pci", str(kernel.root)) for bdf in bdfs]
    real = Binding.restore

    def stuck(self: Binding) -> None:
        if self.bdf == bdfs[1]:
            raise OSError(errno.EIO, "stuck")
        real(self)

    monkeypatch.setattr(binding.Binding, "restore", stuck)
    with pytest.raises(OSError, match="stuck"):
        restore(taken)
    assert taken == []
    assert [kernel.owner(bdf) for bdf in bdfs] == ["", "vfio-pci", ""]


def test_bridges_stay_with_the_kernel(kernel: Kernel) -> None:
    kernel.function("0000:02:00.0", config_space(bridge=(2, 3, 3)), group=1)
    assert endpoints("1", str(kernel.root)) == [BDF]


def test_what_is_open_is_not_opened_again() -> None:
    check_free(["a", "b"], {"c"})
    with pytest.raises(OSError, match="b is open already") as caught:
        check_free(["a", "b"], {"b"})
    assert caught.value.errno == errno.EBUSY
