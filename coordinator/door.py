"""The door of our HTTP servers: who may hold a connection, how long it may keep us waiting, how much it may send.

uvicorn bounds none of these. TLS begins behind the door: a handshake that never ends takes a place like any other.

A place that is needed is taken from whoever has had one the longest without a request in work, and first from the
address that holds most. So connections that say nothing cost their own sender a place, and nobody else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = structlog.get_logger("door")

HANDSHAKE_S = 10.0
HEAD_S = 10.0
IDLE_S = 60.0
UNREAD_S = 30.0
LOOK_S = 1.0
HEAD_BYTES = 64 * 1024
PIPELINED = 16
TELL_EVERY_S = 60.0
SCARCE_S = 0.2


@dataclass(eq=False)
class Place:
    """One connection: from where, since when, and what speaks for it once it may (after a handshake, with TLS)."""

    address: str
    since: float
    welcome: asyncio.Task[None] | None = None
    guest: Guest | None = None

    def free_since(self) -> float | None:
        """Since when it has no request in work; None while it has one."""
        return self.since if self.guest is None else self.guest.free_since

    def end(self) -> None:
        """End it at once."""
        if self.guest is not None:
            self.guest.transport.abort()
        elif self.welcome is not None:
            self.welcome.cancel()


class Doorkeeper:
    """Counts the places of one server: at most `most` in all, and `each` of one address (an IPv6 /64 is one)."""

    def __init__(self, most: int, each: int) -> None:
        self._most, self._each = most, each
        self._places: dict[str, set[Place]] = {}
        self._count = 0
        self._told = -TELL_EVERY_S

    async def accept(
        self, listener: socket.socket, context: ssl.SSLContext | None, guest: Callable[[Place], Guest]
    ) -> None:
        """Let callers in, for ever. `listener` does not block; `guest` makes what speaks for a place."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                caller, peername = await loop.sock_accept(listener)
            except ConnectionError:  # it went away already
                continue
            except OSError as error:  # there are no more files or memory to be had
                log.warning("connections_scarce", error=error.strerror)
                await asyncio.sleep(SCARCE_S)
                continue
            place = self.admit(block_of(peername), loop.time())
            if place is None:
                caller.close()
            else:
                place.welcome = asyncio.create_task(self._welcome(place, caller, context, guest))

    async def _welcome(
        self, place: Place, caller: socket.socket, context: ssl.SSLContext | None, guest: Callable[[Place], Guest]
    ) -> None:
        loop = asyncio.get_running_loop()
        patience = None if context is None else HANDSHAKE_S
        try:
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.connect_accepted_socket(
                lambda: guest(place), caller, ssl=context, ssl_handshake_timeout=patience
            )
        except (
            OSError,
            asyncio.CancelledError,
        ):  # ssl.SSLError is an OSError: no TLS, too late, gone, or no more place
            self.leave(place)
            caller.close()

    def admit(self, address: str, now: float) -> Place | None:
        """A place for a new connection, taken from another if need be; None when all have requests in work."""
        own = self._places.get(address, set())
        if len(own) >= self._each:
            room = self._make_room(own, address, now)
        elif self._count >= self._most:
            largest = max(self._places.values(), key=len)
            room = self._make_room(largest, address, now) or self._make_room(self._all(), address, now)
        else:
            room = True
        if not room:
            return None
        place = Place(address, now)
        self._places.setdefault(address, set()).add(place)
        self._count += 1
        return place

    def leave(self, place: Place) -> None:
        """Give a place back; once is enough, twice does no harm."""
        there = self._places.get(place.address, set())
        if place in there:
            there.remove(place)
            self._count -= 1
            if not there:
                del self._places[place.address]

    async def watch(self) -> None:
        """End those who keep us waiting, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            now = asyncio.get_running_loop().time()
            for place in self._all():
                if place.guest is not None and place.guest.overdue(now):
                    place.end()

    def close(self) -> None:
        """End every connection that has no request in work."""
        for place in self._all():
            if place.free_since() is not None:
                place.end()

    def _all(self) -> set[Place]:
        return {place for there in self._places.values() for place in there}

    def _make_room(self, crowd: set[Place], address: str, now: float) -> bool:
        if now - self._told >= TELL_EVERY_S:
            self._told = now
            log.warning("connections_full", address=address, held=self._count, of_it=len(crowd))
        free = [(since, id(place), place) for place in crowd if (since := place.free_since()) is not None]
        if not free:
            return False
        place = min(free)[2]
        self.leave(place)
        place.end()
        return True


class Guest(HttpToolsProtocol):
    """uvicorn's protocol within bounds of time and bytes; a request's state has the peer's certificate (DER or None).

    What a guest sends beside bodies (head, chunk framing, trailers) may exceed its bodies by HEAD_BYTES: uvicorn and
    httptools would keep any amount of it.
    """

    def __init__(self, keeper: Doorkeeper, place: Place, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._keeper, self._place = keeper, place
        self._received = self._of_bodies = 0
        self.free_since: float | None = place.since
        self._head_by: float | None = None
        self._unread_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The peer's certificate becomes the application's to see, and the first head's time begins."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        self.app_state = {**self.app_state, "peer": tls.getpeercert(binary_form=True) if tls else None}
        self._head_by = self.loop.time() + HEAD_S
        self._place.guest = self

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self._keeper.leave(self._place)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, but not more beside bodies than a head may have."""
        if self.transport.is_closing():
            return
        self._received += len(data)
        super().data_received(data)
        if self._received - 2 * self._of_bodies > HEAD_BYTES:
            self._refuse(431, f"the request's head has more than {HEAD_BYTES} bytes")

    def overdue(self, now: float) -> bool:
        """Whether it has kept us waiting for too long: for a head, for anything at all, or to read its answer."""
        return (
            (self._head_by is not None and now > self._head_by)
            or (self.free_since is not None and now - self.free_since > IDLE_S)
            or (self._unread_since is not None and now - self._unread_since > UNREAD_S)
        )

    def on_message_begin(self) -> None:
        """A head begins: it has its time."""
        self._received = self._of_bodies = 0
        if self.free_since is not None:
            self._head_by = self.loop.time() + HEAD_S
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A request is in work: its place cannot be taken."""
        if len(self.pipeline) >= PIPELINED:
            raise ValueError("too many requests at once")  # httptools tells uvicorn of a bad request
        self._head_by = self.free_since = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count what belongs to bodies."""
        self._of_bodies += len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Answered: from now on the place is free, unless more is asked."""
        more = bool(self.pipeline)
        super().on_response_complete()
        if not more:
            self.free_since = self.loop.time()

    def pause_writing(self) -> None:
        """The guest does not read: it has so long to begin."""
        self._unread_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        self._unread_since = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request in JSON, like every other error."""
        self._refuse(400, "this is not an HTTP request, or more of them at once than are taken")

    def _refuse(self, status: int, reason: str) -> None:
        if self.transport.is_closing():
            return
        body = orjson.dumps({"error": reason})
        head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


def block_of(peername: Any) -> str:
    """What counts as one address: an IPv4 address, the /64 of an IPv6 one, and "" where there is none."""
    try:
        address = ipaddress.ip_address(peername[0].partition("%")[0])
    except (TypeError, IndexError, ValueError, AttributeError):
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
