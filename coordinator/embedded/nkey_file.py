"""NATS key pairs (Ed25519 under NATS's own spelling) kept as one seed file each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import nkeys

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably

_PREFIX = {"account": nkeys.PREFIX_BYTE_ACCOUNT, "user": nkeys.PREFIX_BYTE_USER}


def nkey_public(path: Path, kind: Literal["account", "user"]) -> str:
    """The public key (A... for an account, U... for a user) of the seed in `path`, which is made (0600) if missing.

    Raises ConfigError for a file that holds no seed of that kind.
    """
    if not path.exists():
        write_durably(path, nkeys.encode_seed(os.urandom(32), _PREFIX[kind]) + b"\n", 0o600)
    try:
        public = nkeys.from_seed(bytearray(path.read_bytes().strip())).public_key.decode()
    except Exception as error:  # the library raises its own, binascii's and struct's errors
        raise ConfigError(f"{path} holds no NATS seed: restore it, or delete it to make a new one") from error
    if public[0] != kind[0].upper():
        raise ConfigError(f"{path} holds the seed of {public[0]}..., expected one of kind {kind}")
    return public
