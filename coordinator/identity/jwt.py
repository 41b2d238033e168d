"""NATS JSON web tokens, version 2, as an auth callout needs them: requests read, answers minted.

Source: NATS ADR-14 (claims, encoding), ADR-26 (auth callout); algorithm "ed25519-nkey".
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import nkeys

from bmoe.protocol.errors import ConfigError, MessageError

_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}
MAX_TOKEN_BYTES = 64 * 1024


class Issuer:
    """The account nkey that signs the callout's answers; the broker's configuration names its public half."""

    def __init__(self, seed: bytes) -> None:
        self._pair = nkeys.from_seed(bytearray(seed))
        self.public: str = self._pair.public_key.decode()

    @classmethod
    def load(cls, path: Path) -> Issuer:
        """From a seed file; raises ConfigError when it holds none."""
        try:
            return cls(path.read_bytes().strip())
        except Exception as error:  # the library raises its own, binascii's and struct's errors
            raise ConfigError(f"{path} holds no NATS seed: restore it, or delete it to make a new one") from error

    def mint(self, subject: str, audience: str, nats: dict[str, Any], *, now_s: int, **claims: Any) -> str:
        """A signed token about `subject` for `audience`; `nats` are the NATS claims, `claims` further standard ones."""
        body: dict[str, Any] = {"iat": now_s, "iss": self.public, "sub": subject, "aud": audience, **claims, "jti": ""}
        body["nats"] = {**nats, "version": 2}
        body["jti"] = base64.b32encode(hashlib.new("sha512_256", _json(body)).digest()).rstrip(b"=").decode()
        signed = f"{_encode(_json(_HEADER))}.{_encode(_json(body))}"
        return f"{signed}.{_encode(self._pair.sign(signed.encode()))}"


def read_claims(token: bytes) -> dict[str, Any]:
    """The claims of a token, its signature not verified; raises MessageError for any other shape.

    Enough for a callout's request: only the broker can publish its subject, and the signer's key stands in the token.
    """
    if len(token) > MAX_TOKEN_BYTES:
        raise MessageError(f"a token has at most {MAX_TOKEN_BYTES} bytes, found {len(token)}")
    parts = token.split(b".")
    if len(parts) != 3:
        raise MessageError(f"a token has three parts, found {len(parts)}")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError) as error:
        raise MessageError(f"a token's claims are not JSON in base64url: {str(error)[:100]}") from None
    if not isinstance(claims, dict):
        raise MessageError("a token's claims are not an object")
    return claims


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
