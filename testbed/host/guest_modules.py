# SPDX-License-Identifier: Apache-2.0
"""Modules of this project for a kernel that guests run: from its name to a ``.ko`` file.

The compiler and the kernel's headers are fetched when the first module is wanted: a rack that
loads none needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from testbed.errors import CapabilityMissing
from testbed.host import kbuild, kmod, manifest, prepare, toolchain
from testbed.host.kbuild import KernelTree
from testbed.host.kernel import KernelImage
from testbed.host.kmod import Module
from testbed.host.lock import Lock
from testbed.host.packages import SetupOptions
from testbed.host.toolchain import Toolchain


@dataclass(frozen=True)
class ModuleBuilder:
    """Builds modules for one kernel.

    ``packages``  exactly what it consists of, by set; goes into the lock and the records.
    """

    kernel: KernelImage
    tree: KernelTree
    tools: Toolchain
    setup: SetupOptions
    packages: Mapping[str, Lock] = field(default_factory=dict)

    @property
    def is_packaged(self) -> bool:
        """The kernel and its headers are packages: nobody changes them in their place."""
        return any(name != toolchain.NAME for name in self.packages)

    def build(self, name: str) -> Module:
        """Module ``name`` for this kernel; see :func:`testbed.host.kmod.build` for the errors."""
        return kmod.build(name, self.tree, self.kernel.identity, self.tools, self.setup)


def builder(kernel: str, setup: SetupOptions | None = None) -> ModuleBuilder:
    """What builds modules for a kernel, made or found.

    :param kernel: as in a topology: a name, a path, or ``PATH,modules=FOLDER``.
    :raises CapabilityMissing: nothing to build modules with belongs to this kernel.
    :raises InputError: no such kernel, or its tree was not built.
    :raises SetupError: as :func:`testbed.host.prepare.prepare`.
    """
    setup = setup or prepare.options()
    described = manifest.load()
    root, image = prepare.prepare_kernel(kernel, described, setup)
    if root is None and image.build is None:
        raise CapabilityMissing(
            f"headers of kernel {kernel}: it was given without a tree to build modules in",
            hint="--kernel-tree DIR, or --modules DIR with its `build` folder",
        )
    tools = toolchain.prepare(described.toolchain, setup)
    sets = {toolchain.NAME: tools.packages}
    if root is not None:
        entry = described.kernels[kernel]
        tree, headers = kbuild.packaged(
            kernel, image.release, entry, root, described.headers, tools, setup
        )
        sets[headers.name] = headers.packages
    elif image.build is not None:
        tree = kbuild.built(image.build, image.release)
    return ModuleBuilder(image, tree, tools, setup, sets)
