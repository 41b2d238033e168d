"""Bodies of requests: read within bounds of size and time, decompressed where they say so, and counted while in work."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from bmoe.protocol.errors import InputError, LimitError, MessageError, UnavailableError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Count = Callable[[int], None]

BODY_S = 30.0
# So many times the limit is read and thrown away, for a client that still sends does not read its refusal.
DRAINED = 4


class Bodies:
    """The bytes of all bodies in memory, over HTTP and MQTT alike: at most `most`, and half of it of one tenant."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._of: Counter[str] = Counter()

    def add(self, tenant: str, size: int) -> None:
        """Count some bytes, until they are removed; raises UnavailableError where there is no room for them."""
        if self._held + size > self._most or self._of[tenant] + size > self._most // 2:
            raise UnavailableError(f"bodies of {self._held} bytes are in work, there is no room for more: try again")
        self._held += size
        self._of[tenant] += size

    def remove(self, tenant: str, size: int) -> None:
        """Count them no more."""
        self._held -= size
        self._of[tenant] -= size
        if not self._of[tenant]:
            del self._of[tenant]

    @contextlib.contextmanager
    def held(self, tenant: str) -> Iterator[Count]:
        """Give a function that counts further bytes of one body, until the block is left.

        It raises UnavailableError where there is no room for them.
        """
        own = 0

        def count(size: int) -> None:
            nonlocal own
            self.add(tenant, size)
            own += size

        try:
            yield count
        finally:
            self.remove(tenant, own)


async def read_body(headers: dict[bytes, bytes], receive: Receive, limit: int, count: Count) -> bytes:
    """The body, decompressed where it says so, never holding more than `limit` bytes of it.

    Raises LimitError for one that is larger, InputError for one that does not come within BODY_S.
    """
    announced = number(headers.get(b"content-length"))
    if announced is not None and announced > DRAINED * limit:
        raise LimitError(f"the body has {announced} bytes, at most {limit} are taken")
    try:
        async with asyncio.timeout(BODY_S):
            body = await _received(receive, limit, count)
    except TimeoutError:
        raise InputError(f"the body did not come within {BODY_S:g} s") from None
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding in ("identity", ""):
        return body
    data = await asyncio.to_thread(decompressed, body, encoding, limit)
    count(len(data))
    return data


async def _received(receive: Receive, limit: int, count: Count) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body") and len(message["body"]) <= limit:
        body: bytes = message["body"]  # as nearly all come: in one piece
        count(len(body))
        return body
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
            count(len(part))
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


def number(value: bytes | None) -> int | None:
    """A header that is a length; raises MessageError for one that is none."""
    if value is None:
        return None
    if not value.isdigit() or len(value) > 15:
        raise MessageError(f"a header that must be a length is {value[:32]!r}")
    return int(value)
