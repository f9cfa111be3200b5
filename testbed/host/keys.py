# SPDX-License-Identifier: Apache-2.0
"""The keys of one rack: who may log in, and how to know that it is really this guest.

Made anew for each rack, before it starts: the first connection is authenticated both ways, and
nothing of it is worth stealing once the rack is gone.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

_KEY_TYPE = "ssh-ed25519"


@dataclass(frozen=True)
class RackKeys:
    """All keys of a rack.

    ``client_private``    OpenSSH PEM text, for the harness's SSH client.
    ``client_public``     ``ssh-ed25519 AAAA…``, what root's authorized_keys says.
    ``host_private``      the guest's host key in dropbear's format.
    ``host_public``       ``ssh-ed25519 AAAA…``, what the guest must present.
    """

    client_private: str = field(repr=False)
    client_public: str
    host_private: bytes = field(repr=False)
    host_public: str

    @classmethod
    def generate(cls) -> RackKeys:
        """Two fresh ed25519 pairs."""
        client, host = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        pem = client.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        return cls(
            pem.decode(), openssh_public(client), dropbear_private(host), openssh_public(host)
        )


def openssh_public(key: Ed25519PrivateKey) -> str:
    """``ssh-ed25519 AAAA…``."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def dropbear_private(key: Ed25519PrivateKey) -> bytes:
    """The key as dropbear stores it: type, then secret and public half as one string.

    Source: dropbear's ``src/ed25519.c``, ``buf_put_ed25519_priv_key``.
    """
    secret = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return _string(_KEY_TYPE.encode()) + _string(secret + public)


def _string(data: bytes) -> bytes:
    """RFC 4251, section 5: ``string``."""
    return struct.pack(">I", len(data)) + data
