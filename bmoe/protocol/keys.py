"""Ed25519 signing keys: made, stored, refused when weak, and named by key id.

Source: RFC 8032; the small-order points are those of Cremers and Jackson, "Prime, Order Please!" (2019), table 1.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bmoe.protocol.errors import ConfigError, MessageError
from bmoe.protocol.files import write_durably

KEY_ID_BYTES = 8
_P = 2**255 - 19
_ORDER_8_Y = (
    2707385501144840649318225287225658788936804267575313519463743609750303402022,
    55188659117513257062467267217118295137698188065244968500265048394206261417927,
)
_SMALL_ORDER_Y = frozenset({0, 1, _P - 1, *_ORDER_8_Y})


def check_public_key(public_key: bytes) -> bytes:
    """Return the 32-byte Ed25519 public key unchanged, or raise MessageError if it is weak.

    OpenSSL accepts the eight points of small order, for which one signature verifies for many messages, so a device
    with such a key could deny or forge anything. Non-canonical encodings (y >= p) give one key two names.
    """
    if not isinstance(public_key, bytes) or len(public_key) != 32:
        found = f"{len(public_key)} bytes" if isinstance(public_key, bytes) else type(public_key).__name__
        raise MessageError(f"Ed25519 public key must be 32 bytes, got {found}")
    y = int.from_bytes(public_key, "little") & ((1 << 255) - 1)
    if y >= _P:
        raise MessageError("Ed25519 public key is not canonically encoded (y >= 2^255 - 19)")
    if y in _SMALL_ORDER_Y:
        raise MessageError("Ed25519 public key has small order: one signature would verify for many messages")
    return public_key


def key_id(public_key: bytes) -> bytes:
    """First 8 bytes of SHA-256 over the 32-byte public key: a name for look-up, never a proof."""
    return hashlib.sha256(public_key).digest()[:KEY_ID_BYTES]


def verify_ed25519(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the 64-byte signature is valid for the message under the public key (RFC 8032, section 5.1.7)."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class Signer:
    """A private Ed25519 key with the two forms of its name that messages carry."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self.private_key = private_key
        self.public_key: bytes = private_key.public_key().public_bytes_raw()
        self.key_id = key_id(self.public_key)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature over the message."""
        return self.private_key.sign(message)

    @classmethod
    def generate(cls) -> Signer:
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Signer:
        """The key kept at `path` as 32 raw bytes, mode 0600; made and written durably when absent."""
        try:
            raw = _read(path)
        except FileNotFoundError:
            signer = cls.generate()
            write_durably(path, signer.private_key.private_bytes_raw(), mode=0o600)
            return signer
        return cls.from_bytes(raw, path)

    @classmethod
    def load(cls, path: Path) -> Signer:
        """The key kept at `path`; raises ConfigError when it is absent or damaged."""
        try:
            return cls.from_bytes(_read(path), path)
        except FileNotFoundError as missing:
            raise ConfigError(f"no signing key at {path}: was this device enrolled?") from missing

    @classmethod
    def from_bytes(cls, raw: bytes, path: os.PathLike[str] | str = "memory") -> Signer:
        """A key from its 32 raw bytes."""
        if len(raw) != 32:
            raise ConfigError(f"signing key {path} must hold 32 bytes, holds {len(raw)}: restore it or enrol again")
        # What a file system leaves of a block that it never wrote; anybody can sign with the key of 32 zeros.
        if raw == bytes(32):
            raise ConfigError(f"signing key {path} holds only zeros: restore it or enrol again")
        return cls(Ed25519PrivateKey.from_private_bytes(raw))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"signing key {path} cannot be read: {error.strerror or error}") from error
