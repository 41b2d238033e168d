"""The infer route as plain ASGI, in front of everything else: most of the gateway's time is spent here.

Every request passes the same gates in order: who asks, whether it may, whether there is room, then its body within
bounds of size and time, and only then what it says.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

import orjson
import structlog

from bmoe.protocol.errors import BmoeError, LimitError, QuotaError
from coordinator.bodies import Receive, number, read_body
from coordinator.gateway import Gateway
from coordinator.replies import is_large, reply_of, status_of
from coordinator.tenants import check_model

log = structlog.get_logger("api")
Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

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
        check_model(tenant, model)
        await gateway.usable.wait(model)
        gateway.catalogue.check_version(model, version and unquote(version))
        with gateway.admitted(), gateway.quotas.admitted(tenant, model, now), gateway.bodies.held(tenant.name) as count:
            body = await read_body(headers, receive, gateway.settings.body_bytes, count)
            answered = await gateway.infer(model, body, tenant.name, number(headers.get(HEAD_LENGTH)))
            if is_large(answered):
                return await gateway.aside(lambda: reply_of(answered))
        return reply_of(answered)


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
