# SPDX-License-Identifier: Apache-2.0
"""Verb about guest kernels: which there are, and what each of them can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from testbed.errors import CapabilityMissing, InputError
from testbed.verbs.common import format_option, print_json

if TYPE_CHECKING:
    from testbed.host.kernel import KernelImage
    from testbed.host.packages import PackageRoot, SetupOptions

# What suites rest on, by the option of the kernel's configuration.
CAPABILITIES = {
    "PCI_P2PDMA": "peer-to-peer DMA between PCI functions",
    "DEVICE_PRIVATE": "memory of devices that the CPU cannot reach (HMM)",
    "DMA_SHARED_BUFFER": "dma-buf",
    "VFIO_PCI": "devices in user space (VFIO)",
    "VFIO_PCI_DMABUF": "VFIO exports BARs as dma-buf",
    "IOMMUFD": "IOMMU page tables in user space",
    "INTEL_IOMMU": "iommu kind intel",
    "AMD_IOMMU": "iommu kind amd",
    "VIRTIO_IOMMU": "iommu kind virtio",
}


@click.command()
@click.argument("what", type=click.Choice(["list", "show"]))
@click.argument("name", required=False)
@format_option("text", "json")
def kernel(what: str, name: str | None, form: str) -> None:
    """`list` the guest kernels that have a name; `show` what one of them, or a PATH, is and can.

    `show` makes the kernel ready, which may download it.
    """
    if what == "list":
        if name is not None:
            raise InputError(f"`kernel list` takes no name ('{name}')", hint="kernel show NAME")
        _list(form)
        return
    if name is None:
        raise InputError("`kernel show` needs a kernel", hint="`testbed kernel list` names them")
    _show(name, form)


def _list(form: str) -> None:
    from testbed.host import manifest, packages, prepare

    options = prepare.options(offline=True)
    described = manifest.load()
    rows = []
    for name, entry in described.kernels.items():
        release = ""
        if packages.cached(f"kernel:{name}", entry, options) is not None:
            release = prepare.prepare_kernel(name, described, options)[1].release
        rows.append({"name": name, "packages": list(entry.packages), "release": release})
    if form == "json":
        print_json("testbed.kernels/1", {"kernels": rows})
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        state = row["release"] or f"not downloaded ({', '.join(row['packages'])})"
        click.echo(f"{row['name']:{width}}  {state}")


def _show(name: str, form: str) -> None:
    from testbed.host import manifest, prepare
    from testbed.verbs.install import options

    with options() as setup:
        root, image = prepare.prepare_kernel(name, manifest.load(), setup)
    facts = _facts(name, image, root)
    facts["module_builds"] = _module_builds(name, prepare.options(offline=True))
    if form == "json":
        print_json("testbed.kernel/1", facts)
        return
    for key in ("release", "build_id", "source", "boots", "module_builds"):
        click.echo(f"{key.replace('_', ' ')}: {facts[key] or 'unknown'}")
    if image.missing:
        click.echo(
            f"modules that a guest would want and that are missing: {' '.join(image.missing)}"
        )
    for option, value in facts["capabilities"].items():
        click.echo(f"{value or '-':>4}  CONFIG_{option}: {CAPABILITIES[option]}")
    for package in facts["packages"]:
        click.echo(f"package: {package['name']} {package['version']}")


def _facts(name: str, image: KernelImage, root: PackageRoot | None) -> dict[str, Any]:
    packages = root.packages if root else ()
    return {
        "name": name,
        "release": image.release,
        "build_id": image.build_id,
        "sha256": image.sha256,
        "source": str(image.source),
        "boots": "through its PVH entry" if image.pvh else "as a bzImage",
        "missing_modules": list(image.missing),
        "capabilities": {option: image.option(option) for option in CAPABILITIES}
        if image.config
        else {},
        "packages": [
            {"name": each.name, "version": each.version, "size_bytes": each.size_bytes}
            for each in packages
        ],
    }


def _module_builds(name: str, offline: SetupOptions) -> str:
    """In words, whether modules of ours can be built for it; nothing is downloaded."""
    from testbed.host import guest_modules
    from testbed.host.packages import NotSetUp

    try:
        return f"with {guest_modules.builder(name, offline).tools.compiler}"
    except NotSetUp:
        return "not set up; what it takes is fetched when the first module is wanted"
    except (CapabilityMissing, InputError) as error:
        return f"none: {error}"
