# SPDX-License-Identifier: Apache-2.0
"""A browser without a window, for the tests of the page of a run; made when they first want it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from testbed.errors import SetupError
from testbed.host import product
from testbed.host.manifest import PackageSet
from testbed.host.packages import SetupOptions, ensure

NAME = "browser"
_PROGRAM = "usr/lib/chromium/chromium-headless-shell"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_MORE_LIBRARIES = ("nss", "pulseaudio")  # folders that their packages' own paths would lead to


@dataclass(frozen=True)
class Browser:
    """How it is started.

    ``environment``  all that it needs of one: its libraries and its fonts.
    ``version``      the package's.
    """

    program: Path
    version: str
    environment: Mapping[str, str] = field(default_factory=dict)


def prepare(packages: PackageSet, options: SetupOptions, folder: Path) -> Browser:
    """The browser, made or found.

    :param folder: an existing one, for its home, its fonts' cache and its settings.
    :raises SetupError, MirrorError: it cannot be downloaded or unpacked.
    """
    unpacked = ensure(NAME, packages, options)
    root = unpacked.root
    if not (root / _PROGRAM).is_file():
        raise SetupError(f"{root}: no {_PROGRAM} among the packages of '{NAME}'")
    fonts = folder / "fonts.conf"
    try:
        fonts.write_text(
            '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>'
            f"<dir>{escape(str(root / 'usr/share/fonts'))}</dir>"
            f"<cachedir>{escape(str(folder / 'fonts'))}</cachedir></fontconfig>\n"
        )
    except OSError as error:
        raise product.disk_error(error, folder) from error
    libraries = [root / _LIBRARIES, *(root / _LIBRARIES / each for each in _MORE_LIBRARIES)]
    environment = {
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "FONTCONFIG_FILE": str(fonts),
        "HOME": str(folder),
        "PATH": "/usr/bin:/bin",
    }
    version = unpacked.version("chromium-headless-shell")
    return Browser(root / _PROGRAM, version, environment)
