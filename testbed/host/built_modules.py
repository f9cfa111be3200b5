# SPDX-License-Identifier: Apache-2.0
"""Modules of this project that were built for a kernel of the manifest's, found again.

Working out which file it is reads the manifest, the packages' locks, the kernel's configuration
and its symbols: a tenth of a second for each rack, to find that nothing has changed. So the answer
is remembered under a hash of all that it depends on, as a set-up's is
(:mod:`testbed.host.installation`).
"""

from __future__ import annotations

from pathlib import Path

from testbed.host import installation, paths, remembered
from testbed.host.digest import digest
from testbed.host.progress import Progress

FORMAT = 1
_KIND = "module"
_MOST = 64  # are kept


def module_file(kernel: str, name: str, progress: Progress | None = None) -> Path:
    """Module ``name`` for a kernel, built if need be.

    :param kernel: as in a topology. Nothing is remembered of a path, for what is there may have
        changed.
    :raises CapabilityMissing, InputError, SetupError: as :func:`guest_modules.builder` and its
        ``build``.
    """
    cache = paths.cache_dir().absolute()
    stored = remembered.recall(_KIND, _key(kernel, name, cache), cache)
    if isinstance(stored, str) and Path(stored).is_file():
        return Path(stored)
    from testbed.host import guest_modules, prepare  # noqa: PLC0415  slow

    builder = guest_modules.builder(kernel, prepare.options(progress=progress))
    file: Path = builder.build(name).file
    if builder.is_packaged:
        # What was fetched on the way is one of the things that it depends on.
        remembered.remember(_KIND, _key(kernel, name, cache), cache, str(file), most=_MOST)
    return file


def _key(kernel: str, name: str, cache: Path) -> str:
    return digest(FORMAT, kernel, name, *installation.inputs(cache))
