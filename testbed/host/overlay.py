# SPDX-License-Identifier: Apache-2.0
"""A machine's own initial RAM disk: image, modules, agent, and the few files that are its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import HostError
from testbed.host import cpio, product
from testbed.host.agent import AgentBundle
from testbed.host.image import GuestImage
from testbed.host.kernel import KernelImage

if TYPE_CHECKING:
    from testbed.host.keys import RackKeys


def build_initrd(
    target: Path,
    image: GuestImage,
    kernel: KernelImage,
    *,
    keys: RackKeys,
    node_name: str,
    agent: AgentBundle,
) -> None:
    """Write the node's initial RAM disk to ``target`` (mode 0600: it holds the host key).

    :raises HostError: it cannot be written; nothing is left then.
    """
    _write_all(target, image, kernel, agent, own_archive(keys, node_name))


def build_waiting_initrd(
    target: Path,
    image: GuestImage,
    kernel: KernelImage,
    *,
    agent: AgentBundle,
    reset: Sequence[str],
    modules: Sequence[Path] = (),
) -> None:
    """The same for a machine that is to be saved: no keys, no name; it waits for them.

    :param reset: addresses of functions that no driver shall use then, as a restore resets them.
    :param modules: kernel modules of ours that it shall have loaded then.
    :raises HostError: it cannot be written; nothing is left then.
    """
    own = cpio.archive(
        (
            cpio.directory("/etc/testbed"),
            cpio.regular("/etc/testbed/saved", f"{' '.join(reset)}\n".encode()),
            cpio.directory("/etc/testbed/modules"),
            *(cpio.from_file(f"/etc/testbed/modules/{file.name}", file) for file in modules),
            cpio.regular("/etc/hostname", b"saved\n"),
        )
    )
    _write_all(target, image, kernel, agent, own)


def _write_all(
    target: Path, image: GuestImage, kernel: KernelImage, agent: AgentBundle, own: bytes
) -> None:
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            for part in (image.archive, kernel.modules, agent.archive):
                _append(descriptor, part)
            with os.fdopen(os.dup(descriptor), "wb") as stream:
                stream.write(own)
        finally:
            os.close(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        raise HostError(*product.disk_error(error, target).args) from error


def own_archive(keys: RackKeys, node_name: str) -> bytes:
    """The files that only this machine has."""
    authorized = f"{keys.client_public}\n".encode()
    return cpio.archive(
        (
            cpio.directory("/root", 0o700),
            cpio.directory("/root/.ssh", 0o700),
            cpio.regular("/etc/dropbear/host_key", keys.host_private, 0o600),
            cpio.regular("/root/.ssh/authorized_keys", authorized, 0o600),
            cpio.regular("/etc/hostname", f"{node_name}\n".encode()),
        )
    )


def _append(target: int, part: Path) -> None:
    """Copy a file to the end of an open one inside the kernel: shared blocks where it can."""
    with part.open("rb") as source:
        left = os.fstat(source.fileno()).st_size
        while left > 0:
            copied = os.sendfile(target, source.fileno(), None, left)
            if copied == 0:
                raise OSError(0, "it became shorter while it was read", str(part))
            left -= copied
