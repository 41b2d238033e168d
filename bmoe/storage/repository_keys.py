"""The private keys that sign a repository's metadata: one file a key, named by its key id, readable by its owner alone.

A key may be kept elsewhere: a role whose threshold cannot be met from this folder is not signed, and the error says so.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from securesystemslib.signer import CryptoSigner, SSlibKey

from bmoe.protocol.errors import ConfigError
from bmoe.protocol.files import write_durably

_KEY_ID = re.compile(r"[0-9a-f]{64}")


class KeyFolder:
    """Ed25519 keys in one folder, mode 0600."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def generate(self) -> SSlibKey:
        """A new key, durably kept; what verifies its signatures."""
        private = Ed25519PrivateKey.generate()
        signer = CryptoSigner(private)
        self.folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self.folder, 0o700)
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_durably(self._path(signer.public_key.keyid), pem, 0o600)
        key: SSlibKey = signer.public_key
        return key

    def signer(self, keyid: str) -> CryptoSigner | None:
        """What signs with that key, None where it is not here; raises ConfigError for a file that holds another."""
        path = self._path(keyid)
        try:
            private = load_pem_private_key(path.read_bytes(), None)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{path}: not an Ed25519 private key in PEM: {error}") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(f"{path}: not an Ed25519 private key")
        signer = CryptoSigner(private)
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
