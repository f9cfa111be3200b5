# SPDX-License-Identifier: Apache-2.0
"""Finding a kernel's parts from what the user named, and making it ready once."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from testbed.errors import InputError
from testbed.host import kernel
from testbed.host.manifest import ModuleLists
from testbed.host.packages import SetupOptions

from .test_kernel_file import BUILD_ID, RELEASE, bzimage, elf
from .test_modules import module

WANTED = ModuleLists(boot=("virtio_net",))


def make(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def image() -> bytes:
    return bzimage(gzip.compress(elf()))


@pytest.fixture
def package(tmp_path: Path, image: bytes) -> Path:
    """As Debian's 7.2 packages lie in their folder."""
    folder = tmp_path / "package/usr/lib/modules" / RELEASE
    make(folder / "vmlinuz", image)
    make(folder / "config", b'CONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\nCONFIG_D="x y"\n')
    make(folder / "kernel/drivers/net/virtio_net.ko", module())
    return tmp_path / "package"


@pytest.fixture
def options(tmp_path: Path) -> SetupOptions:
    return SetupOptions(cache=tmp_path / "cache")


def test_a_package(package: Path, options: SetupOptions) -> None:
    made = kernel.prepare("k", package, WANTED, options)
    assert (made.release, made.pvh, made.missing) == (RELEASE, True, ())
    assert made.image.read_bytes() == elf()
    assert [made.option(name) for name in "ABCDE"] == ["y", "m", None, "x y", None]


def test_a_bare_file_has_no_modules(tmp_path: Path, image: bytes, options: SetupOptions) -> None:
    made = kernel.prepare("k", make(tmp_path / "bzImage", image), WANTED, options)
    assert made.missing == ("virtio_net",)
    assert made.config is None
    assert made.option("A") is None


def test_an_older_package_or_make_install(
    tmp_path: Path, image: bytes, options: SetupOptions
) -> None:
    root = tmp_path / "root"
    file = make(root / f"boot/vmlinuz-{RELEASE}", image)
    make(root / f"boot/config-{RELEASE}", b"CONFIG_A=y\n")
    make(root / f"lib/modules/{RELEASE}/kernel/virtio_net.ko", module())
    for path in (root, file):
        made = kernel.prepare("k", path, WANTED, options)
        assert made.missing == ()
        assert made.option("A") == "y"


def test_a_built_tree(tmp_path: Path, image: bytes, options: SetupOptions) -> None:
    tree = tmp_path / "linux"
    make(tree / "arch/x86/boot/bzImage", image)
    make(tree / ".config", b"CONFIG_A=y\n")
    make(tree / "drivers/net/virtio_net.ko", module())
    make(tree / "modules.order", b"drivers/net/virtio_net.o\n")
    vmlinux = make(tree / "vmlinux", elf())
    for path in (tree, vmlinux, tree / "arch/x86/boot/bzImage"):
        made = kernel.prepare("k", path, WANTED, options)
        assert (made.missing, made.option("A")) == ((), "y")


def test_it_is_made_once_and_again_when_it_changed(
    tmp_path: Path, image: bytes, options: SetupOptions
) -> None:
    file = make(tmp_path / "bzImage", image)
    first = kernel.prepare("k", file, WANTED, options)
    stamp = first.image.stat().st_mtime_ns
    again = kernel.prepare("k", file, WANTED, options)
    assert again == first
    assert again.image.stat().st_mtime_ns == stamp
    make(file, bzimage(b"something else"))
    changed = kernel.prepare("k", file, WANTED, options)
    assert changed.image != first.image
    assert not changed.pvh


@pytest.mark.parametrize("name", ["none", "empty", "text"])
def test_what_is_no_kernel(tmp_path: Path, name: str, options: SetupOptions) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match=name):
        kernel.prepare("k", tmp_path / name, WANTED, options)
    assert not list(options.cache.rglob("kernel.json"))


def test_which_one(tmp_path: Path, image: bytes) -> None:
    make(tmp_path / "boot/vmlinuz-1", image)
    make(tmp_path / "boot/vmlinuz-2", image)
    with pytest.raises(InputError, match="several kernels"):
        kernel.locate(tmp_path)


def test_modules_elsewhere(tmp_path: Path, image: bytes, options: SetupOptions) -> None:
    file = make(tmp_path / "bzImage", image)
    installed = tmp_path / "install/lib/modules" / RELEASE
    make(installed / "kernel/virtio_net.ko", module())
    make(installed / "config", b"CONFIG_A=y\n")
    make(tmp_path / "built/Makefile", b"")
    (installed / "build").symlink_to(tmp_path / "built")
    for folder in (installed, tmp_path / "install"):
        made = kernel.prepare("k", file, WANTED, options, module_folder=folder)
        assert (made.missing, made.option("A"), made.build) == ((), "y", tmp_path / "built")


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nowhere", "no such folder"), ("empty", "no kernel modules"), ("two", "several kernels")],
)
def test_a_folder_that_has_no_modules(
    tmp_path: Path, image: bytes, folder: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    for release in "12":
        make(tmp_path / f"two/lib/modules/{release}/kernel/x.ko", module())
    with pytest.raises(InputError, match=message):
        kernel.locate(make(tmp_path / "bzImage", image), tmp_path / folder)


def test_modules_of_another_kernel_are_refused(
    package: Path, tmp_path: Path, options: SetupOptions
) -> None:
    file = package / f"usr/lib/modules/{RELEASE}/kernel/drivers/net/virtio_net.ko"
    make(file, module() + b"vermagic=6.1.0-9-amd64 SMP mod_unload \0")
    with pytest.raises(InputError, match=rf"is for 6\.1\.0-9-amd64, but the kernel is {RELEASE}"):
        kernel.prepare("k", package, WANTED, options)
    assert not list(options.cache.rglob("kernel.json"))


def test_a_tree_that_was_not_built(tmp_path: Path) -> None:
    make(tmp_path / "Kconfig", b"")
    with pytest.raises(InputError, match="was not built: there is no arch/x86/boot/bzImage"):
        kernel.locate(tmp_path)


def test_every_build_has_another_identity(
    package: Path, tmp_path: Path, options: SetupOptions
) -> None:
    made = kernel.prepare("k", package, WANTED, options)
    assert made.build_id == made.identity == BUILD_ID
    opaque = make(tmp_path / "bzImage", bzimage(b"unknown compression"))
    unknown = kernel.prepare("k", opaque, WANTED, options)
    assert (unknown.build_id, unknown.identity) == ("", unknown.sha256)


def test_a_word_for_a_kernel() -> None:
    assert kernel.split_word("default") == ("default", None)
    assert kernel.split_word("/a/b") == ("/a/b", None)
    assert kernel.split_word("/a/b,modules=/c d") == ("/a/b", Path("/c d"))
