# SPDX-License-Identifier: Apache-2.0
"""What modules are built against, and building them with a make of our own making."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from testbed.errors import CapabilityMissing, InputError, ModuleBuildError, SetupError
from testbed.host import kbuild, kmod, kmod_sources, toolchain
from testbed.host.apt import NotOffered
from testbed.host.kbuild import KernelTree
from testbed.host.lock import LockedPackage
from testbed.host.manifest import Headers, PackageSet
from testbed.host.packages import PackageRoot, SetupOptions
from testbed.host.toolchain import Toolchain

RELEASE = "7.9.1-mine"


def built_tree(folder: Path, release: str = RELEASE, config: str = "CONFIG_PCI_P2PDMA=y\n") -> Path:
    files = {
        ".config": config,
        "Makefile": "modules:\n",
        "include/config/auto.conf": config,
        "include/generated/autoconf.h": "",
        "include/generated/utsrelease.h": f'#define UTS_RELEASE "{release}"\n',
        "scripts/mod/modpost": "",
        "Module.symvers": "0x1\tiommu_map\tvmlinux\tEXPORT_SYMBOL_GPL\t\n",
    }
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_built_tree_says_what_it_is(tmp_path: Path) -> None:
    tree = kbuild.built(built_tree(tmp_path), RELEASE)
    assert tree.release == RELEASE
    assert tree.config == {"PCI_P2PDMA": "y"}
    assert tree.symbols == {"iommu_map"}


def test_another_build_is_another_tree(tmp_path: Path) -> None:
    before = kbuild.built(built_tree(tmp_path), RELEASE).identity
    assert kbuild.built(tmp_path, RELEASE).identity == before
    (tmp_path / "Module.symvers").write_text("")
    assert kbuild.built(tmp_path, RELEASE).identity != before


def test_a_tree_that_was_not_built_says_what_is_missing(tmp_path: Path) -> None:
    built_tree(tmp_path)
    (tmp_path / "Module.symvers").unlink()
    (tmp_path / "scripts/mod/modpost").unlink()
    with pytest.raises(InputError, match=r"no scripts/mod/modpost, Module\.symvers") as caught:
        kbuild.built(tmp_path, RELEASE)
    assert caught.value.hint == "make modules_prepare; make"


def test_a_tree_of_another_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it is of 7\.9\.1-mine, but the kernel is 7\.9\.0"):
        kbuild.built(built_tree(tmp_path), "7.9.0")


def test_a_tree_of_clang_needs_clang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built_tree(tmp_path, config="CONFIG_CC_IS_CLANG=y\n")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(CapabilityMissing, match="clang"):
        kbuild.built(tmp_path, RELEASE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/clang").write_text("#!/bin/sh\n")
    (tmp_path / "bin/clang").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert kbuild.built(tmp_path, RELEASE).words == (f"LLVM={tmp_path}/bin/",)


def test_a_wrapper_passes_words_on_untouched(tmp_path: Path) -> None:
    root = tmp_path / "a root"
    loader = root / "usr/lib64/ld-linux-x86-64.so.2"
    loader.parent.mkdir(parents=True)
    loader.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    loader.chmod(0o755)
    script = tmp_path / "ld"
    script.write_text(toolchain.wrapper(root, root / "usr/bin/x ld", "-B", "two words"))
    script.chmod(0o755)
    said = subprocess.run([script, "a b", "*"], capture_output=True, text=True, check=True).stdout
    libraries = root / "usr/lib/x86_64-linux-gnu"
    assert said == (
        f"<--library-path><{libraries}><--argv0><{script}>"
        f"<{root}/usr/bin/x ld><-B><two words><a b><*>"
    )


@pytest.mark.parametrize("name", ["My Cache", "a:b", "50%"])
def test_a_cache_that_make_cannot_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SetupError, match="make knows no") as caught:
        toolchain.check_path(tmp_path / name)
    assert "TESTBED_CACHE_DIR" in caught.value.hint


def test_headers_that_no_mirror_has_are_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ensure(name: str, wanted: PackageSet, _: SetupOptions) -> PackageRoot:
        asked.append((name, wanted))
        raise NotOffered("Unable to locate package")

    monkeypatch.setattr(kbuild, "ensure", ensure)
    present = LockedPackage("linux-base-7", "7-1", "amd64", "0" * 64, 1)
    kernel = PackageSet(suites=("some",), packages=("linux-image-7",))
    installed = PackageRoot("kernel:old", "key", tmp_path, (present,))
    headers = Headers(package="linux-headers-{release}", assumed=("gcc",))

    def packaged(options: SetupOptions) -> None:
        with pytest.raises(CapabilityMissing, match=r"linux-headers-7\.0.* does not offer"):
            kbuild.packaged("old", "7.0", kernel, installed, headers, tools(tmp_path, ""), options)

    for _ in range(2):
        packaged(SetupOptions(cache=tmp_path / "cache"))
    ((name, wanted),) = asked
    assert (name, wanted.suites, wanted.packages) == (
        "headers:old",
        ("some",),
        ("linux-headers-7.0",),
    )
    assert wanted.assumed == ("gcc", "linux-base-7=7-1"), "the kernel itself is not fetched again"
    packaged(SetupOptions(cache=tmp_path / "cache", refresh=True))
    assert len(asked) == 2


@pytest.fixture
def tree(tmp_path: Path) -> KernelTree:
    return kbuild.built(built_tree(tmp_path / "tree"), RELEASE)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "guest_agent/kmod/demo"
    folder.mkdir(parents=True)
    (folder / "module.yaml").write_text("optional: [iommu_map, other]\n")
    (folder / "demo.c").write_text("int x;\n")
    monkeypatch.setattr("testbed.host.paths.data_dir", lambda name: tmp_path / name)
    return folder


def tools(tmp_path: Path, script: str) -> Toolchain:
    """A toolchain whose make does what the script says, in the module's folder."""
    binaries = tmp_path / "bin"
    binaries.mkdir(exist_ok=True)
    make = binaries / "make"
    make.write_text(
        '#!/bin/sh\nfor w; do case $w in M=*) cd "${w#M=}";; KCFLAGS=*) flags=$w;; esac; done\n'
        f'echo "$*" >>{tmp_path}/calls\n{script}\n'
    )
    make.chmod(0o755)
    return Toolchain("k", tmp_path, binaries, "gcc", ())


def built(tmp_path: Path, tree: KernelTree, script: str) -> kmod.Module:
    options = SetupOptions(cache=tmp_path / "cache")
    return kmod.build("demo", tree, "id", tools(tmp_path, script), options)


def test_a_module_is_built_once(tmp_path: Path, tree: KernelTree, sources: Path) -> None:
    script = 'echo "$flags" >demo.ko'
    first = built(tmp_path, tree, script)
    assert first.file.read_text() == "KCFLAGS=-DHAVE_IOMMU_MAP\n", "what the kernel exports"
    assert built(tmp_path, tree, script) == first
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    (sources / "demo.c").write_text("int y;\n")
    assert built(tmp_path, tree, script).file != first.file
    assert sorted(path.name for path in first.file.parent.iterdir()) == ["demo.ko"]


def test_what_modules_share_is_in_each_build(
    tmp_path: Path, tree: KernelTree, sources: Path
) -> None:
    common = sources.parent / "common"
    common.mkdir()
    (common / "shared.h").write_text("int a;\n")
    first = built(tmp_path, tree, "cat shared.h >demo.ko")
    assert first.file.read_text() == "int a;\n"
    hashed = kmod_sources.source_hash("demo")
    (common / "shared.h").write_text("int b;\n")
    assert built(tmp_path, tree, "cat shared.h >demo.ko").file.read_text() == "int b;\n"
    assert kmod_sources.source_hash("demo") != hashed, "a saved machine has the module of before"
    with pytest.raises(SetupError, match="no kernel module 'common'"):
        kmod_sources.source_hash("common")


def test_what_the_compiler_says_is_passed_on(
    tmp_path: Path, tree: KernelTree, sources: Path
) -> None:
    script = 'echo noise; echo "$PWD/demo.c:3:9: error: expected"; echo more; exit 2'
    with pytest.raises(ModuleBuildError) as caught:
        built(tmp_path, tree, script)
    assert str(caught.value).splitlines() == [
        f"module demo cannot be compiled for kernel {RELEASE}:",
        "  demo.c:3:9: error: expected",
    ]
    assert not list((tmp_path / "cache/modules").glob("*/*")), "nothing half-made is left"


def test_a_symbol_that_the_kernel_lacks_is_a_capability(
    tmp_path: Path, tree: KernelTree, sources: Path
) -> None:
    script = """echo 'ERROR: modpost: "pci_acs" [/x/demo.ko] undefined!'; exit 2"""
    with pytest.raises(CapabilityMissing, match=f"the symbol pci_acs in .* kernel {RELEASE}"):
        built(tmp_path, tree, script)
    (sources / "module.yaml").write_text("symbols: [iommu_map, gone]\n")
    with pytest.raises(CapabilityMissing, match="the symbol gone in"):
        built(tmp_path, tree, "exit 9")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("too many arguments to function 'iommu_map'", "iommu_map"),
        ("implicit declaration of function 'pcim_p2pdma_init'; did you mean …", "pcim_p2pdma_init"),
        ("'struct dma_buf_ops' has no member named 'pin'", "struct dma_buf_ops"),
        ("'DMABUF' undeclared (first use in this function)", "DMABUF"),
        ("passing argument 2 of 'sort' from incompatible pointer type", "sort"),
    ],
)
def test_another_interface_is_a_capability(
    tmp_path: Path, tree: KernelTree, sources: Path, words: str, name: str
) -> None:
    script = f"""echo "demo.c:1:1: error: {words}"; echo "make: *** [x] Error 1"; exit 2"""
    with pytest.raises(CapabilityMissing, match=f"^{name} as module demo knows it") as caught:
        built(tmp_path, tree, script)
    assert words in caught.value.hint
    with pytest.raises(ModuleBuildError):
        built(tmp_path, tree, f"echo 'demo.c:2:2: error: our own fault'; {script}")


def test_an_option_that_the_kernel_lacks_is_a_capability(
    tmp_path: Path, tree: KernelTree, sources: Path
) -> None:
    (sources / "module.yaml").write_text("config: [PCI_P2PDMA, IOMMUFD]\nsymbols: [gone]\n")
    with pytest.raises(CapabilityMissing, match=r"^CONFIG_IOMMUFD in the guest's kernel"):
        built(tmp_path, tree, "exit 9")
    assert not (tmp_path / "calls").exists(), "nothing is compiled in vain"


def test_nothing_of_the_users_environment_gets_into_a_build(
    tmp_path: Path, tree: KernelTree, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KBUILD_EXTRA_SYMBOLS", "/x")
    monkeypatch.setenv("MAKEFLAGS", "-n")
    module = built(tmp_path, tree, "env >demo.ko")
    names = {line.partition("=")[0] for line in module.file.read_text().splitlines()}
    assert names <= {"PATH", "LC_ALL", "HOME", "PWD", "OLDPWD", "SHLVL", "_"}


def test_a_module_that_does_not_exist_is_named(tmp_path: Path, tree: KernelTree) -> None:
    with pytest.raises(SetupError, match="no kernel module 'nothing'"):
        kmod.build("nothing", tree, "id", tools(tmp_path, ""), SetupOptions(cache=tmp_path))


def test_every_shipped_module_says_what_it_needs() -> None:
    assert "p2p_probe" in kmod_sources.names()
    for name in kmod_sources.names():
        files = kmod_sources.sources(name)
        assert {"Kbuild", "module.yaml"} <= {file.name for file in files}
        assert len({file.name for file in files}) == len(files), "they are built in one folder"
        assert any(file.suffix == ".c" for file in files)
        assert kmod._needs(files).config
        for file in files:
            assert "SPDX-License-Identifier: GPL-2.0-only" in file.read_text().splitlines()[0]


def packages_of_a_compiler(root: Path) -> Path:
    binaries = root / "usr/bin"
    passes = root / "usr/libexec/gcc/x86_64-linux-gnu/14"
    for folder in (binaries, passes):
        folder.mkdir(parents=True)
    for name in ("gcc-14", *toolchain._BINUTILS):
        (binaries / f"x86_64-linux-gnu-{name}").touch()
    for file in (binaries / "make", passes / "cc1", passes / "collect2"):
        file.touch()
    return root


def test_every_program_of_the_toolchain_has_a_wrapper(tmp_path: Path) -> None:
    root = packages_of_a_compiler(tmp_path / "root")
    made = tmp_path / "made"
    made.mkdir()
    toolchain._make(root, made, tmp_path / "final")
    names = {path.name for path in (made / "bin").iterdir()}
    assert {"make", "x86_64-linux-gnu-gcc", "x86_64-linux-gnu-ld"} <= names
    assert not {"gcc", "cc", "ld"} & names, "a host's own name would hide that it was used"
    assert f"-B {tmp_path}/final/passes/" in (made / "bin/x86_64-linux-gnu-gcc").read_text()
    assert {"as", "cc1", "collect2", "ld"} <= {path.name for path in (made / "passes").iterdir()}
    assert all(path.stat().st_mode & 0o111 for path in made.rglob("*"))


def test_packages_without_a_compiler_are_no_toolchain(tmp_path: Path) -> None:
    root = packages_of_a_compiler(tmp_path / "root")
    (root / "usr/libexec/gcc/x86_64-linux-gnu/14/cc1").unlink()
    with pytest.raises(SetupError, match="no compiler"):
        toolchain._make(root, tmp_path, tmp_path)


def test_the_folder_of_a_packaged_tree_holds_no_program_of_another_libc(tmp_path: Path) -> None:
    headers = tmp_path / "headers"
    flavour = built_tree(headers / f"usr/src/linux-headers-{RELEASE}")
    (flavour / "Makefile").write_text(
        "KBUILD_OUTPUT=/usr/src/x\ninclude /usr/src/linux-headers-7-common/Makefile\n"
    )
    program = flavour / "scripts/basic/fixdep"
    program.parent.mkdir()
    program.write_bytes(b"\x7fELF rest")
    program.chmod(0o755)
    script = flavour / "scripts/setlocalversion"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    (flavour / "tools").mkdir()
    folder, final = tmp_path / "folder", tmp_path / "final"
    folder.mkdir()
    kbuild._link(headers, RELEASE, folder, final, tools(tmp_path, ""))
    assert (folder / "Makefile").read_text() == (
        f"KBUILD_OUTPUT={final}\ninclude {headers}/usr/src/linux-headers-7-common/Makefile\n"
    )
    assert f"{final}/scripts/basic/.fixdep.program" in (folder / "scripts/basic/fixdep").read_text()
    assert (folder / "scripts/basic/.fixdep.program").read_bytes() == b"\x7fELF rest"
    assert (folder / "scripts/setlocalversion").read_text() == "#!/bin/sh\n"
    assert not (folder / "Module.symvers").is_symlink(), "a build may write it"
    assert program.read_bytes() == b"\x7fELF rest", "the packages stay as they are"
