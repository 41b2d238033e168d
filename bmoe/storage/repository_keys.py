"""The private keys that sign a repository's metadata: one file a key, named by its key id, readable by its owner alone.

A key may be kept elsewhere: a role whose threshold cannot be met from this folder is not signed, and the error says so.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from securesystemslib.signer import CryptoSigner, SSlibKey

from bmoe.protocol.errors import ConfigError, InputError, RefusedError
from bmoe.protocol.files import write_durably

_KEY_ID = re.compile(r"[0-9a-f]{64}")


class KeyFolder:
    """Ed25519 keys in one folder, mode 0600."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: list[str] = []

    def generate(self) -> SSlibKey:
        """A new key, durably kept; what verifies its signatures."""
        self.folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self.folder, 0o700)
        private, key = _new()
        write_durably(self._path(key.keyid), private, 0o600)
        self._made.append(key.keyid)
        return key

    def keep_made(self) -> None:
        """The keys made of late are in use, or may be."""
        self._made.clear()

    def forget_made(self) -> None:
        """Remove the keys made of late: the change that they were made for did not come about."""
        for keyid in self._made:
            self.forget(keyid)
        self._made.clear()

    def signer(self, keyid: str) -> CryptoSigner | None:
        """What signs with that key, None where it is not here; raises ConfigError for a file that holds another."""
        path = self._path(keyid)
        if not path.exists():
            return None
        signer = read_signer(path)
        if signer.public_key.keyid != keyid:
            raise ConfigError(f"{path} holds the key {signer.public_key.keyid}, not the one it is named by")
        return signer

    def forget(self, keyid: str) -> None:
        """Remove a key that no role has any more."""
        self._path(keyid).unlink(missing_ok=True)

    def _path(self, keyid: str) -> Path:
        if _KEY_ID.fullmatch(keyid) is None:
            raise ConfigError(f"{keyid[:80]!r} is not a key id of 64 hex digits")
        return self.folder / f"{keyid}.key"


def read_signer(path: Path) -> CryptoSigner:
    """What signs with the key in a file; raises ConfigError for a file that holds no Ed25519 key."""
    try:
        private = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: not an Ed25519 private key in PEM: {error}") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"{path}: not an Ed25519 private key")
    return CryptoSigner(private)


def write_key(path: Path) -> SSlibKey:
    """Make a key to be kept in a file of its own, mode 0600; raises RefusedError for a file that is there already."""
    if path.exists():
        raise RefusedError(f"{path} is there already: a key is not written over")
    private, key = _new()
    write_durably(path, private, 0o600)
    return key


def render_public(key: SSlibKey) -> dict[str, Any]:
    """A public key as JSON values."""
    return {"keyid": key.keyid, **key.to_dict()}


def read_public(values: Any) -> SSlibKey:
    """A public key from such values; raises InputError for anything but an Ed25519 key under its own id."""
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(values["keyval"]["public"]))
        key: SSlibKey = SSlibKey.from_crypto(public)
        named = values["keyid"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"not a public key as `bmoe release new-key` writes it: {error!r}"[:300]) from None
    if key.keyid != named:
        raise InputError(f"not a public key as `bmoe release new-key` writes it: its id is {key.keyid}")
    return key


def _new() -> tuple[bytes, SSlibKey]:
    private = Ed25519PrivateKey.generate()
    key: SSlibKey = CryptoSigner(private).public_key
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), key
