"""The door for SuperNodes: TLS on the agents' address, and of the SuperLink behind it POST /v1/fleet/NAME alone.

Everything else of the SuperLink, its control API above all, which asks nobody who he is, answers 403 here. Who may
come is for the SuperLink to say, by its nodes' keys; how much one address may ask for is bounded here.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import structlog

from bmoe.protocol.figures import Figures
from coordinator.door import block_of

log = structlog.get_logger("flower")
PATH = re.compile(r"/v1/fleet/[a-z-]{1,64}")
# SuperNodes ask and answer in a few kilobytes; what is large comes to them.
BODY_MAX = 1 << 20
BODY_S = 15.0
UPSTREAM_S = 60.0
# Of one address: requests in work at once, and bytes that it may send, at once and each second from then on.
SLOTS = 16
BURST_BYTES, BYTES_PER_S = 32 << 20, 64 << 10
ADDRESSES = 4096
NOT_PASSED = (b"host", b"content-length", b"connection", b"transfer-encoding", b"expect")
NOT_RETURNED = (b"transfer-encoding", b"connection", b"server", b"date")
Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass
class Caller:
    """What one address has left: requests at once, and bytes to send."""

    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SLOTS))
    left: float = BURST_BYTES
    since: float = field(default_factory=time.monotonic)

    def takes(self, count: int) -> bool:
        """Whether it may send so many bytes more, which are then spent."""
        now = time.monotonic()
        self.left = min(BURST_BYTES, self.left + (now - self.since) * BYTES_PER_S)
        self.since = now
        if count > self.left:
            return False
        self.left -= count
        return True


class Proxy:
    """An ASGI application in front of one SuperLink on loopback."""

    def __init__(self, port: int, ca: Path) -> None:
        self.requests = self.bytes_in = self.bytes_out = self.refused = 0
        self._callers: OrderedDict[str, Caller] = OrderedDict()
        self._url = f"https://127.0.0.1:{port}"
        self._client = httpx.AsyncClient(
            verify=ssl.create_default_context(cafile=str(ca)), timeout=UPSTREAM_S, trust_env=False
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            return
        if not passes(scope["method"], bytes(scope.get("raw_path") or b""), bytes(scope.get("query_string") or b"")):
            return await self._refuse(send, 403)
        caller = self._caller(block_of(scope.get("client")))
        async with caller.slots:
            try:
                body = await asyncio.wait_for(_body(receive, caller), BODY_S)
            except asyncio.TimeoutError:
                body = 408
            if isinstance(body, int):
                return await self._refuse(send, body)
            await self._pass(scope, body, send)

    async def _pass(self, scope: Scope, body: bytes, send: Send) -> None:
        """The answer is handed on as it comes: a caller that reads slowly costs no memory."""
        headers = [(name, value) for name, value in scope["headers"] if name not in NOT_PASSED]
        request = httpx.Request(
            "POST", self._url + scope["path"], headers=headers, content=body, extensions={"timeout": _TIMEOUT}
        )
        begun = False
        try:
            found = await self._client.send(request, stream=True)
            try:
                back = [(n.lower(), v) for n, v in found.headers.raw if n.lower() not in NOT_RETURNED]
                await send({"type": "http.response.start", "status": found.status_code, "headers": back})
                begun = True
                async for chunk in found.aiter_raw():
                    self.bytes_out += len(chunk)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            finally:
                await found.aclose()
        except httpx.HTTPError as error:
            log.warning("superlink_unreachable", error=str(error) or type(error).__name__)
            if begun:  # what is missing cannot be said any more: the connection ends short of its length
                raise
            return await _reply(send, 503)
        await send({"type": "http.response.body", "body": b""})
        self.requests += 1
        self.bytes_in += len(body)

    def figures(self) -> Figures:
        """What has passed so far."""
        return {
            "requests": self.requests, "bytes in": self.bytes_in, "bytes out": self.bytes_out, "refused": self.refused,
        }  # fmt: skip

    async def close(self) -> None:
        """Close the connections to the SuperLink."""
        await self._client.aclose()

    def _caller(self, address: str) -> Caller:
        caller = self._callers.setdefault(address, Caller())
        self._callers.move_to_end(address)
        if len(self._callers) > ADDRESSES:
            self._callers.popitem(last=False)
        return caller

    async def _refuse(self, send: Send, status: int) -> None:
        self.refused += 1
        await _reply(send, status)


_TIMEOUT = httpx.Timeout(UPSTREAM_S).as_dict()


def passes(method: str, raw_path: bytes, query: bytes) -> bool:
    """Whether a request may reach the SuperLink, by its path exactly as it was sent."""
    return method == "POST" and not query and PATH.fullmatch(raw_path.decode("latin-1")) is not None


async def _body(receive: Receive, caller: Caller) -> bytes | int:
    """The body, or the status that says why it is not taken."""
    data = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return 400  # gone
        piece = message.get("body", b"")
        data += piece
        if len(data) > BODY_MAX:
            return 413
        if not caller.takes(len(piece)):
            return 429
        if not message.get("more_body"):
            return bytes(data)


async def _reply(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
