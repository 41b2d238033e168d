"""The infer route as plain ASGI, in front of everything else: most of the gateway's time is spent here.

Every request passes the same gates in order: who asks, whether it may, whether there is room, then its body within
bounds of size and time, and only then what it says.
"""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

import orjson
import structlog

from bmoe.protocol.errors import BmoeError, InputError, LimitError, MessageError, QuotaError
from coordinator.gateway import Gateway
from coordinator.replies import reply_of, status_of

log = structlog.get_logger("api")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_S = 30.0
# So many times the limit is read and thrown away, for a client that still sends does not read its refusal.
DRAINED = 4
PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
Headers = tuple[tuple[bytes, bytes], ...]
NO_HEADERS: Headers = ()
JSON = (b"content-type", b"application/json")
BINARY = (b"content-type", b"application/octet-stream")
HEAD_LENGTH = b"inference-header-content-length"


class InferRoute:
    """Serves POST …/infer; hands everything else on to `rest`."""

    def __init__(self, gateway: Gateway, rest: App) -> None:
        self._gateway, self._rest = gateway, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        matched = PATH.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if matched is None:
            await self._rest(scope, receive, send)
            return
        head: int | None = None
        code, more = 200, NO_HEADERS
        try:
            head, body = await self._infer(matched, dict(scope["headers"]), receive)
        except Exception as error:
            body, code, more = _failure(error, scope["path"])
            self._gateway.counts.http_errors[code] += 1
        headers = [JSON if head is None else BINARY, (b"content-length", b"%d" % len(body)), *more]
        if head is not None:
            headers.append((HEAD_LENGTH, b"%d" % head))
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _infer(
        self, matched: re.Match[str], headers: dict[bytes, bytes], receive: Receive
    ) -> tuple[int | None, bytes]:
        """The reply: the length of its JSON head where binary data follow, and its bytes."""
        gateway = self._gateway
        model, version = unquote(matched[1]), matched[2]
        given = headers.get(b"authorization")
        now = time.monotonic()
        tenant = gateway.access.tenant(given.decode("latin-1") if given is not None else None, now)
        gateway.catalogue.check_version(model, version and unquote(version))
        with gateway.admitted(), gateway.quotas.admitted(tenant, model, now):
            body = await read_body(headers, receive, gateway.settings.body_bytes)
            answered = await gateway.infer(model, body, tenant.name, _number(headers.get(HEAD_LENGTH)))
        return reply_of(answered)


async def read_body(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The body, decompressed where it says so, never holding more than `limit` bytes of it.

    Raises LimitError for one that is larger, InputError for one that does not come within BODY_S.
    """
    announced = _number(headers.get(b"content-length"))
    if announced is not None and announced > DRAINED * limit:
        raise LimitError(f"the body has {announced} bytes, at most {limit} are taken")
    try:
        async with asyncio.timeout(BODY_S):
            body = await _received(receive, limit)
    except TimeoutError:
        raise InputError(f"the body did not come within {BODY_S:g} s") from None
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding in ("identity", ""):
        return body
    return await asyncio.to_thread(decompressed, body, encoding, limit)


async def _received(receive: Receive, limit: int) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body") and len(message["body"]) <= limit:
        return message["body"]  # as nearly all come: in one piece
    parts: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise InputError("the client went away before its body was complete")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            parts.clear()
        else:
            parts.append(part)
        if not message.get("more_body") or size > DRAINED * limit:
            if size > limit:
                raise LimitError(f"the body has {size} bytes or more, at most {limit} are taken")
            return b"".join(parts)
        message = await receive()


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """A gzip or deflate body (RFC 9110, section 8.4.1); raises LimitError for one that would grow beyond `limit`."""
    if encoding not in ("gzip", "deflate"):
        raise MessageError(f"Content-Encoding {encoding[:32]!r} is not gzip or deflate")
    machine = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: gzip or zlib, told by the header
    try:
        data = machine.decompress(body, limit + 1)
    except zlib.error as error:
        raise MessageError(f"the body is not {encoding}: {error}") from None
    if len(data) > limit:
        raise LimitError(f"the body exceeds {limit} bytes when decompressed")
    if not machine.eof or machine.unused_data:
        raise MessageError(f"the body is not one whole {encoding} stream")
    return data


def _number(value: bytes | None) -> int | None:
    if value is None:
        return None
    if not value.isdigit() or len(value) > 15:
        raise MessageError(f"a header that must be a length is {value[:32]!r}")
    return int(value)


def _failure(error: Exception, path: str) -> tuple[bytes, int, Headers]:
    """Body, status and further headers for an error."""
    if not isinstance(error, BmoeError):
        log.exception("request_failed", path=path)
        return b'{"error":"internal error; the gateway\'s log has the details"}', 500, ()
    status = status_of(error)
    more = NO_HEADERS
    if isinstance(error, QuotaError):
        more = ((b"retry-after", b"%d" % max(1, round(error.retry_s + 0.5))),)
    elif status == 401:
        more = ((b"www-authenticate", b"Bearer"),)
    elif isinstance(error, LimitError):
        more = ((b"connection", b"close"),)  # what is left of the body is not worth reading
    return orjson.dumps({"error": str(error)}), status, more
