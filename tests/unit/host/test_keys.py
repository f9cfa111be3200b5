# SPDX-License-Identifier: Apache-2.0
"""A rack's keys: paramiko reads the client's, dropbear's format holds the host's."""

from __future__ import annotations

import base64
import io
import struct

import paramiko

from testbed.host.keys import RackKeys


def strings(data: bytes) -> list[bytes]:
    found = []
    while data:
        (length,) = struct.unpack_from(">I", data)
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return found


def test_the_client_key_is_what_the_guest_is_told() -> None:
    keys = RackKeys.generate()
    private = paramiko.Ed25519Key.from_private_key(io.StringIO(keys.client_private))
    assert keys.client_public == f"ssh-ed25519 {private.get_base64()}"


def test_the_host_key_is_what_the_client_expects() -> None:
    keys = RackKeys.generate()
    kind, both = strings(keys.host_private)
    assert kind == b"ssh-ed25519"
    assert len(both) == 64, "the secret half, then the public one"
    assert strings(base64.b64decode(keys.host_public.split()[1])) == [kind, both[32:]]


def test_every_rack_has_its_own_and_shows_none() -> None:
    first, second = RackKeys.generate(), RackKeys.generate()
    assert first.client_public != second.client_public
    assert first.host_public != second.host_public
    assert "PRIVATE" not in repr(first)
    assert repr(first.host_private) not in repr(first)
