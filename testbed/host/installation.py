# SPDX-License-Identifier: Apache-2.0
"""What a finished set-up led to, as a value, and its memory.

Working it out again reads the manifest, the package sets' locks and every file of ours that is in
the image: a tenth of a second, most of it for the libraries that read them. So it is remembered
under a hash of all that it depends on. Products never change, so that what was remembered holds as
long as all of it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from testbed.host import paths, remembered
from testbed.host.agent import PACKAGE, AgentBundle
from testbed.host.digest import digest
from testbed.host.image import GuestImage, GuestPython
from testbed.host.kernel import KernelImage
from testbed.host.lock import Lock, LockedPackage
from testbed.host.toolroot import Qemu

DEFAULT_KERNEL = "default"
FORMAT = 1
_KIND = "installation"
_MOST = 16  # are kept


@dataclass(frozen=True)
class Installation:
    """All that starting a machine takes from this host.

    ``kernels``   by the name or path that was asked for.
    ``packages``  exactly which packages it consists of, by set; part of each run's record.
    """

    qemu: Qemu
    image: GuestImage
    agent: AgentBundle
    kernels: Mapping[str, KernelImage]
    packages: Mapping[str, Lock] = field(default_factory=dict)

    def kernel(self, name: str = DEFAULT_KERNEL) -> KernelImage:
        """The kernel that was asked for by this name.

        :raises KeyError: it was not asked for.
        """
        return self.kernels[name]


def recall(kernels: Sequence[str], cache: Path) -> Installation | None:
    """What was remembered of a set-up of the tool root's QEMU and these kernels, if it still holds.

    :param kernels: names; nothing is remembered of a path, for what is there may have changed.
    """
    stored = remembered.recall(_KIND, _key(kernels, cache), cache)
    if not isinstance(stored, dict):
        return None
    try:
        found = _from_data(stored)
    except (KeyError, TypeError, ValueError):
        return None
    return found if all(path.exists() for path in _files(found)) else None


def remember(installation: Installation, cache: Path) -> None:
    """For :func:`recall`; what cannot be written is worked out again.

    :param installation: made of packages only.
    """
    key = _key(tuple(installation.kernels), cache)
    remembered.remember(_KIND, key, cache, _to_data(asdict(installation)), most=_MOST)


def _key(kernels: Sequence[str], cache: Path) -> str:
    return digest(FORMAT, sorted(set(kernels)), *inputs(cache))


def inputs(cache: Path) -> Iterator[Any]:
    """All that decides what a set-up leads to: our files, our code, and where entries point."""
    yield str(cache)
    for name in ("images", PACKAGE):
        yield remembered.state_of(paths.data_dir(name), below=True)
    for folder in (Path(__file__).parent, cache / "current"):
        yield remembered.state_of(folder)


def _files(found: Installation) -> Iterator[Path]:
    yield from (Path(word) for word in found.qemu.words if word.startswith("/"))
    yield from (found.image.archive, found.agent.archive, found.image.python.root)
    for kernel in found.kernels.values():
        yield from (kernel.image, kernel.modules)


def _from_data(data: Mapping[str, Any]) -> Installation:
    image, qemu = data["image"], data["qemu"]
    python = image["python"]
    return Installation(
        qemu=Qemu(**{**qemu, "words": tuple(qemu["words"])}),
        image=GuestImage(
            Path(image["archive"]),
            image["key"],
            GuestPython(Path(python["root"]), Path(python["program"]), python["tag"]),
        ),
        agent=AgentBundle(**{**data["agent"], "archive": Path(data["agent"]["archive"])}),
        kernels={name: _kernel(kernel) for name, kernel in data["kernels"].items()},
        packages={
            name: tuple(LockedPackage(**package) for package in packages)
            for name, packages in data["packages"].items()
        },
    )


def _to_data(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_data(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_to_data(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _kernel(data: Mapping[str, Any]) -> KernelImage:
    places = ("image", "source", "config", "modules", "build")
    values: dict[str, Any] = dict(data)
    values |= {name: Path(values[name]) for name in places if values[name]}
    values["missing"] = tuple(data["missing"])
    return KernelImage(**values)
