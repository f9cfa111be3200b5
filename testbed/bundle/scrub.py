# SPDX-License-Identifier: Apache-2.0
"""What of the host stays at home: its paths, and keys if any were logged. Pure.

Words as ``alice`` alone are not looked for: they may mean anything. Where things were on the host
is known (:mod:`testbed.host.places`), so the result does not depend on where the bundle is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

SCRUBBED = (
    "paths of the host: $RUN, $CACHE, $STATE, $RUNTIME, $TESTBED, $CWD and $HOME stand for them",
    "other home folders: $HOME stands for each",
    "private keys",
)

_ENDS = rb"(?![A-Za-z0-9_.~+-])"
_BEGINS = rb"(?<![A-Za-z0-9_.~+-])"
_UPWARDS = rb"(?:(?:\.\./)*\.\.)?"  # pytest names files relative to where it was started
_HOMES = re.compile(_UPWARDS + rb"/(?:home|Users)/[^/\s\"':,;()\[\]{}<>\\]+")
_ROOT = re.compile(_BEGINS + rb"/root(?=/)")
_KEY = re.compile(
    rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----[^\"]*?"
    rb"(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|(?=\"|\Z))"
)


def scrubber(places: Mapping[str, str]) -> Callable[[bytes], bytes]:
    """What takes them out of a text.

    :param places: absolute paths by the words that stand for them.
    """
    known: dict[bytes, bytes] = {}
    for word, path in places.items():
        # Of the root folder, or of /tmp where somebody happened to stand, nobody learns anything.
        if path.count("/") >= (1 if word == "HOME" else 2) and len(path) > 1:
            known.setdefault(path.rstrip("/").encode(), b"$" + word.encode())
    longest_first = sorted(known, key=len, reverse=True)
    pattern = b"|".join(map(re.escape, longest_first))
    paths = re.compile(_BEGINS + _UPWARDS + b"(" + pattern + b")" + _ENDS) if known else None

    def scrub(content: bytes) -> bytes:
        if paths is not None:
            content = paths.sub(lambda found: known[found[1]], content)
        content = _HOMES.sub(b"$HOME", content)
        content = _ROOT.sub(b"$HOME", content)
        return _KEY.sub(b"(a private key was here)", content)

    return scrub
