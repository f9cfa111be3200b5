# SPDX-License-Identifier: Apache-2.0
"""``images/manifest.yaml``: what the tool root, the guest image and the kernels are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from testbed.errors import SetupError
from testbed.host import paths

# libyaml's reader, where there is one: a tenth of the 60 ms that each rack would wait for Python's.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NAME = r"^[a-z0-9][a-z0-9+.-]*$"
PackageName = Annotated[str, Field(pattern=_NAME)]
AssumedName = Annotated[str, Field(pattern=_NAME.rstrip("$") + r"(=[A-Za-z0-9.+:~-]+)?$")]
ModuleName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PackageSet(_Strict):
    """Some Debian packages with what they depend on, unpacked into one folder.

    ``suites``       where they come from (component ``main``, amd64).
    ``date_waived``  take an index past its validity date; its signature is checked all the same.
    ``packages``     what is wanted; dependencies follow, recommendations do not.
    ``assumed``      dependencies that are left out, as nothing here needs them: ``name``, or
                     ``name=version`` where another package wants exactly one version.
    """

    suites: tuple[PackageName, ...] = Field(min_length=1)
    date_waived: bool = False
    packages: tuple[PackageName, ...] = Field(min_length=1)
    assumed: tuple[AssumedName, ...] = ()


class Headers(_Strict):
    """What it takes to build modules for a kernel of Debian's.

    ``package``  with ``{release}`` where the kernel's release stands; of the kernel's own suites.
    ``assumed``  as of a package set; the packages of the kernel itself are assumed too.
    """

    package: str
    assumed: tuple[PackageName, ...] = ()

    def of(self, kernel: PackageSet, release: str, present: Sequence[str]) -> PackageSet:
        """The package set for the kernel of that release.

        :param present: the kernel's own packages, ``name=version``.
        """
        return PackageSet(
            suites=kernel.suites,
            date_waived=kernel.date_waived,
            packages=(self.package.format(release=release),),
            assumed=(*self.assumed, *present),
        )


class ModuleLists(_Strict):
    """Kernel modules that go into a guest; what they depend on follows.

    ``boot``  loaded by init, in this order.
    ``lazy``  there for the agent to load when it needs them.
    """

    boot: tuple[ModuleName, ...] = ()
    lazy: tuple[ModuleName, ...] = ()


class GuestFiles(_Strict):
    """Which files of the guest's packages go into its image; libraries they link to follow.

    ``programs``         paths of ELF files below the root, and shell globs.
    ``links``            symbolic links to make: path → target.
    ``python_modules``   standard library modules and packages, by name.
    ``python_excluded``  globs below the standard library that are left out all the same.
    """

    programs: tuple[str, ...]
    links: Mapping[str, str] = {}
    python_modules: tuple[str, ...]
    python_excluded: tuple[str, ...] = ()


class Manifest(_Strict):
    """The whole file."""

    version: int = Field(ge=1, le=1)
    toolroot: PackageSet
    toolchain: PackageSet
    browser: PackageSet
    virtme: PackageSet
    headers: Headers
    guest: PackageSet
    image: GuestFiles
    modules: ModuleLists
    kernels: Mapping[str, PackageSet]


def load(path: Path | None = None) -> Manifest:
    """Read the manifest that comes with the testbed, or another one.

    :raises SetupError: it cannot be read or says something that has no meaning.
    """
    path = path or paths.data_dir("images") / "manifest.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        return Manifest.model_validate(yaml.load(text, Loader=YAML_LOADER))  # noqa: S506  a safe one
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SetupError(f"{path}: {error}") from error
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        raise SetupError(f"{path}: {faults}") from error
