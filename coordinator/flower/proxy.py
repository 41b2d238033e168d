"""The door for SuperNodes: TLS on the agents' address, and of the SuperLink behind it POST /v1/fleet/NAME alone.

Everything else of the SuperLink, its control API above all, which asks nobody who he is, answers 403 here.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import structlog

from bmoe.protocol.figures import Figures

log = structlog.get_logger("flower")
PATH = re.compile(r"/v1/fleet/[a-z-]{1,64}")
# flwr cuts what it sends into objects; none of ours is larger than a piece and its frame.
BODY_MAX = 32 << 20
UPSTREAM_S = 60.0
NOT_PASSED = (b"host", b"content-length", b"connection", b"transfer-encoding", b"expect")
NOT_RETURNED = ("content-length", "transfer-encoding", "content-encoding", "connection", "server", "date")
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Proxy:
    """An ASGI application in front of one SuperLink on loopback."""

    def __init__(self, port: int, ca: Path) -> None:
        self.requests = self.bytes_in = self.bytes_out = 0
        self._client = httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{port}", verify=ssl.create_default_context(cafile=str(ca)), timeout=UPSTREAM_S,
            trust_env=False,
        )  # fmt: skip

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            return
        if not passes(scope["method"], bytes(scope.get("raw_path") or b""), bytes(scope.get("query_string") or b"")):
            return await _reply(send, 403)
        body = await _body(receive)
        if body is None:
            return await _reply(send, 413)
        headers = [(name, value) for name, value in scope["headers"] if name not in NOT_PASSED]
        try:
            found = await self._client.post(scope["path"], content=body, headers=headers)
        except httpx.HTTPError as error:
            log.warning("superlink_unreachable", error=str(error) or type(error).__name__)
            return await _reply(send, 503)
        self.requests += 1
        self.bytes_in += len(body)
        self.bytes_out += len(found.content)
        back = [(n.lower(), v) for n, v in found.headers.raw if n.decode("latin-1").lower() not in NOT_RETURNED]
        await _reply(send, found.status_code, back, found.content)

    def figures(self) -> Figures:
        """What has passed so far."""
        return {"requests": self.requests, "bytes in": self.bytes_in, "bytes out": self.bytes_out}

    async def close(self) -> None:
        """Close the connections to the SuperLink."""
        await self._client.aclose()


def passes(method: str, raw_path: bytes, query: bytes) -> bool:
    """Whether a request may reach the SuperLink, by its path exactly as it was sent."""
    return method == "POST" and not query and PATH.fullmatch(raw_path.decode("latin-1")) is not None


async def _body(receive: Receive) -> bytes | None:
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        data += message.get("body", b"")
        if len(data) > BODY_MAX:
            return None
        if not message.get("more_body"):
            return bytes(data)


async def _reply(send: Send, status: int, headers: list[tuple[bytes, bytes]] | None = None, body: bytes = b"") -> None:
    length = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*(headers or []), *length]})
    await send({"type": "http.response.body", "body": body})
