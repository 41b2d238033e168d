"""The one-time join token: where the gateway is, the token's id and secret, and which CA to believe.

"bmoe1." and base64url without padding over the CBOR array [url, id (8 bytes), secret (16), SHA-256 of the CA's DER (32)].
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bmoe.protocol.encoding import decode, encode
from bmoe.protocol.errors import InputError, MessageError

PREFIX = "bmoe1."
MAX_CHARS = 1000
_ALPHABET = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class JoinToken:
    """A parsed token. `pin` is SHA-256 over the CA certificate's DER."""

    url: str
    token: bytes
    secret: bytes
    pin: bytes

    def text(self) -> str:
        """The token's one spelling."""
        raw = encode([self.url, self.token, self.secret, self.pin])
        return PREFIX + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def parse_token(text: str) -> JoinToken:
    """The token in `text`, which is one spelled as `JoinToken.text` spells it; raises MessageError otherwise."""
    text = text.strip()
    body = text[len(PREFIX) :]
    if not text.startswith(PREFIX) or len(text) > MAX_CHARS or not _ALPHABET.fullmatch(body):
        raise MessageError(f"a join token begins with {PREFIX!r} and has letters, digits, '-' and '_': copy it whole")
    try:
        values = decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), MAX_CHARS)
    except (ValueError, InputError):
        raise MessageError("the join token is damaged or cut short: copy it whole") from None
    kinds = tuple(type(value) for value in values) if type(values) is tuple else ()
    if kinds != (str, bytes, bytes, bytes) or [len(v) for v in values[1:]] != [8, 16, 32]:
        raise MessageError("the join token has not the parts it should have: ask for a new one")
    token = JoinToken(check_url(values[0]), *values[1:])
    if token.text() != text:
        raise MessageError("the join token is not spelled as it was issued: copy it whole")
    return token


def check_url(url: Any) -> str:
    """An https URL of a host and perhaps a port, and nothing else; raises MessageError for any other."""
    if type(url) is not str:
        raise MessageError(f"the gateway's address must be text, found {type(url).__name__}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        port, parts = 0, urlsplit("")
    plain = parts.scheme == "https" and parts.hostname and f"https://{parts.netloc}" == url and "@" not in parts.netloc
    if not plain or port == 0 or not url.isascii() or not url.isprintable() or " " in url:
        raise MessageError(f"the gateway's address must be like https://192.168.1.10:8443, found {url[:100]!r}")
    return url
