# SPDX-License-Identifier: Apache-2.0
"""Kernel modules of our own, compiled for the kernel that a guest runs.

The sources of module NAME are in ``guest_agent/kmod/NAME``: C files, a ``Kbuild``, and
``module.yaml``, which says what it needs of a kernel; beside them in a build are those of
``common``. ``CACHE/modules/KEY/NAME.ko`` is the result; KEY is a hash of the kernel, its headers,
the sources and the compiler.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from testbed.errors import CapabilityMissing, Interrupted, ModuleBuildError, SetupError
from testbed.host import child, kmod_sources, product
from testbed.host.digest import digest
from testbed.host.kbuild import KernelTree
from testbed.host.manifest import YAML_LOADER
from testbed.host.packages import SetupOptions
from testbed.host.toolchain import Toolchain, check_path

BUILDER = 1
_MAKE_TIMEOUT_S = 300.0
_POLL_S = 0.05
_SHOWN_ERRORS = 5
_ERROR = re.compile(r"\berror: |\bERROR: |^make.*\*\*\* ")
# What the compiler says where a kernel's interface is another than the sources were written for.
_INTERFACE = re.compile(
    r"error: (?:too (?:many|few) arguments to function '(\w+)'"
    r"|implicit declaration of function '(\w+)'"
    r"|passing argument \d+ of '(\w+)'"
    r"|unknown type name '(\w+)'"
    r"|'([^']+)' (?:undeclared|has no member named))"
)
_UNDEFINED = re.compile(r'modpost: "([^"]+)" \[[^\]]*\] undefined!')

Option = Annotated[str, Field(pattern=r"^[A-Z0-9_]+$")]
Symbol = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


class Needs(BaseModel):
    """``module.yaml``: what a module needs of the kernel.

    ``config``    options that have to be set, without ``CONFIG_``.
    ``symbols``   what the kernel has to export.
    ``optional``  what it may export: the sources see ``HAVE_NAME`` (upper case) if it does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    config: tuple[Option, ...] = ()
    symbols: tuple[Symbol, ...] = ()
    optional: tuple[Symbol, ...] = ()


@dataclass(frozen=True)
class Module:
    """A module that is ready for a guest."""

    name: str
    file: Path
    release: str


def build(
    name: str, tree: KernelTree, kernel_id: str, tools: Toolchain, options: SetupOptions
) -> Module:
    """Module ``name`` for the kernel of ``tree``, from the cache or else compiled.

    :param kernel_id: the kernel's build-id.
    :raises CapabilityMissing: the kernel lacks an option or a symbol, which is named.
        So does one whose module interface is another than the sources know.
    :raises ModuleBuildError: the compiler refuses it for any other reason, in its own words.
    :raises SetupError: there is no such module; no space.
    """
    sources = kmod_sources.sources(name)
    needs = _needs(sources)
    _check(needs, tree)
    have = tuple(symbol for symbol in needs.optional if symbol in tree.symbols)
    content = [(path.name, path.read_bytes()) for path in sources]
    key = digest(BUILDER, tree.identity, kernel_id, tools.key, have, name, content)
    final = options.cache / "modules" / key
    module = Module(name, final / f"{name}.ko", tree.release)
    if not module.file.is_file():
        check_path(options.cache)
        options.progress.say(f"module {name}: compiling for {tree.release}")
        lock = options.cache / "locks" / f"module-{key}.lock"
        with product.exclusive(lock, options.waiting(f"module {name}")):
            if not module.file.is_file():
                with product.building(final) as folder:
                    work = folder / "work"
                    work.mkdir()
                    for file, data in content:
                        (work / file).write_bytes(data)
                    _compile(name, work, tree, have, tools, options)
                    (work / f"{name}.ko").rename(folder / f"{name}.ko")
                    product.remove_tree(work)
    return module


def _needs(sources: list[Path]) -> Needs:
    file = next(path for path in sources if path.name == "module.yaml")
    try:
        data = yaml.load(file.read_text(), Loader=YAML_LOADER)  # noqa: S506  a safe one
        return Needs.model_validate(data or {})
    except (ValidationError, yaml.YAMLError) as error:
        raise SetupError(f"{file}: {error}") from error


def _check(needs: Needs, tree: KernelTree) -> None:
    lacking = [f"CONFIG_{each}" for each in needs.config if tree.config.get(each) not in ("y", "m")]
    if not lacking:  # without its option a symbol is not to be expected
        lacking = [f"the symbol {each}" for each in needs.symbols if each not in tree.symbols]
    if lacking:
        raise CapabilityMissing(f"{', '.join(lacking)} in the guest's kernel {tree.release}")


def _compile(
    name: str,
    work: Path,
    tree: KernelTree,
    have: tuple[str, ...],
    tools: Toolchain,
    options: SetupOptions,
) -> None:
    command = [
        *child.DIE_WITH_US,
        str(tools.bin / "make"),
        # MO: where results go, said explicitly so that nothing is ever written into the tree.
        *("-C", str(tree.folder), f"M={work}", f"MO={work}"),
        *tree.words,
        "KCFLAGS=" + " ".join(f"-DHAVE_{symbol.upper()}" for symbol in have),
        # Debugging and type information: nobody reads it, and it takes half of the time.
        *("CONFIG_DEBUG_INFO=", "CONFIG_DEBUG_INFO_BTF_MODULES="),
        "modules",
    ]
    output = work / "make.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=tools.environment,
            process_group=0,
        )
        try:
            _wait(process, options)
        finally:
            child.end(process)
    said = output.read_text(encoding="utf-8", errors="replace")
    if process.returncode == 0 and (work / f"{name}.ko").is_file():
        return
    undefined = sorted(set(_UNDEFINED.findall(said)))
    if undefined and "error: " not in said:
        which = ", ".join(f"the symbol {each}" for each in undefined)
        raise CapabilityMissing(f"{which} in the guest's kernel {tree.release}")
    errors = _first_errors(said, work)
    if others := _other_interface(said):
        raise CapabilityMissing(
            f"{', '.join(others)} as module {name} knows it, in the guest's kernel {tree.release}",
            hint=f"the compiler's first words:\n{errors}",
        )
    raise ModuleBuildError(f"module {name} cannot be compiled for kernel {tree.release}:\n{errors}")


def _other_interface(said: str) -> list[str]:
    """The kernel's functions and types that explain every error; none if one is unexplained."""
    names = []
    for line in said.splitlines():
        if "error: " in line:
            found = _INTERFACE.search(line)
            if found is None:
                return []
            names.append(next(group for group in found.groups() if group))
    return list(dict.fromkeys(names))


def _wait(process: subprocess.Popen[bytes], options: SetupOptions) -> None:
    waited_s = 0.0
    while process.poll() is None:
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            waited_s += _POLL_S
        if options.cancelled.is_set():
            raise Interrupted("the set-up was ended")
        if waited_s > _MAKE_TIMEOUT_S:
            raise SetupError(f"make did not end within {_MAKE_TIMEOUT_S:.0f} s")


def _first_errors(said: str, work: Path) -> str:
    lines = [line.replace(f"{work}/", "") for line in said.splitlines()]
    errors = [line for line in lines if _ERROR.search(line)] or lines[-_SHOWN_ERRORS:]
    return "\n".join(f"  {line}" for line in errors[:_SHOWN_ERRORS])
