"""Asks the gateway whether a join token is still good, before a card is made with it. It costs the token nothing."""

from __future__ import annotations

import hashlib
import http.client
import json
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bmoe.protocol.errors import RefusedError, UnavailableError
from bmoe.protocol.join_token import JoinToken
from bmoe.protocol.text import plain

TIMEOUT_S = 5.0
REPLY_BYTES = 64 * 1024


@dataclass(frozen=True)
class Standing:
    """What the gateway says of a token: the device's name it is bound to, "" for none, its owner, and its end."""

    name: str
    owner: str
    expires_ms: int


def ask(token: JoinToken, name: str) -> Standing:
    """What the token is good for. Raises RefusedError for one that is expired, used, revoked, unknown or another board's,
    or when the gateway is not the one that the token pins; UnavailableError where it cannot be asked."""
    parts = urlsplit(token.url)
    host, port = parts.hostname or "", parts.port or 443
    # The gateway's CA is known by its digest alone, so the first answer is checked against that and nothing else.
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    _, pem = _call(host, port, unverified, "GET", "/v1/ca", None)
    try:
        authority = ssl.PEM_cert_to_DER_cert(pem.decode("ascii").strip())
        # Those bytes and no others: behind the pinned certificate a text may hold further ones, which would be trusted too.
        verified = ssl.create_default_context(cadata=authority)
    except (ValueError, ssl.SSLError):
        raise UnavailableError(f"{token.url} is no gateway of bmoe: its /v1/ca is not one certificate") from None
    if hashlib.sha256(authority).digest() != token.pin:
        raise RefusedError(f"the gateway at {token.url} is not the one that made this token: its CA is another")
    body = json.dumps({"token": token.token.hex(), "secret": token.secret.hex(), "name": name or None}).encode()
    status, reply = _call(host, port, verified, "POST", "/v1/token-check", body)
    return _standing(status, reply, token.url)


def _standing(status: int, reply: bytes, url: str) -> Standing:
    try:
        answer: Any = json.loads(reply)
        if status == 200:
            return Standing(str(answer["name"] or ""), str(answer["owner"]), int(answer["expires_ms"]))
        reason = plain(" ".join(str(answer["error"]).split()), 300)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UnavailableError(f"{url} gives no answer about tokens (HTTP {status})") from None
    kind = RefusedError if status == 403 else UnavailableError
    raise kind(reason)


def _call(
    host: str, port: int, context: ssl.SSLContext, method: str, path: str, body: bytes | None
) -> tuple[int, bytes]:
    connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        return response.status, response.read(REPLY_BYTES)
    except ssl.SSLCertVerificationError as error:  # the board, which believes the same CA, would be refused for ever
        raise RefusedError(
            f"the certificate of https://{host}:{port} is not for this address, or out of date: {error.verify_message}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(
            f"https://{host}:{port} does not answer: {getattr(error, 'strerror', None) or error}"
        ) from None
    finally:
        connection.close()
