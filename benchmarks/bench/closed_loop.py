"""The client: many keep-alive connections, each sending its next request when its last is answered (a closed loop).

Raw sockets under asyncio and bodies made beforehand, so that little of the machine goes into asking.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from bmoe.protocol.errors import UnavailableError

END_OF_HEAD = b"\r\n\r\n"
DRAIN_S = 20.0
STRETCH = 4
SAMPLES = 4
ERROR_WIDTH = 160


@dataclass
class Run:
    """What one phase saw. `done` counts every answer, `latencies_ms` those that came within the measured time."""

    done: int = 0
    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One keep-alive connection; `finished` is called with (status, head, body) for each response."""

    def __init__(self, finished: Callable[[Connection, int, bytes, bytes], None], lost: Callable[[], None]) -> None:
        self._finished, self._lost, self._waiting = finished, lost, False
        self._received, self._need = bytearray(), 0
        self.sent = 0.0
        self.number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what is written to."""
        self.transport: asyncio.WriteTransport = transport  # type: ignore[assignment]

    def send(self, number: int, request: bytes) -> None:
        """Send one request."""
        self.number, self.sent, self._waiting = number, time.perf_counter(), True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Bytes of a reply; asyncio calls it."""
        received = self._received
        received += data
        if not self._need:
            end = received.find(END_OF_HEAD)
            if end < 0:
                return
            self._head = end + len(END_OF_HEAD)
            self._need = self._head + _content_length(bytes(received[:end]))
        if len(received) >= self._need:
            head, body = bytes(received[: self._head]), bytes(received[self._head : self._need])
            del received[: self._need]
            self._need, self._waiting = 0, False
            self._finished(self, int(head[9:12]), head, body)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell of it if an answer was still owed."""
        if self._waiting:  # a server may well end a connection that is done
            self._lost()


def _content_length(head: bytes) -> int:
    found = head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0].strip()
    if not found.isdigit():
        raise UnavailableError(f"a response without Content-Length: {head[:200]!r}")
    return int(found)


def headers_of(head: bytes) -> dict[str, str]:
    """A response's headers, names in lower case."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if value}


async def run(
    host: str, port: int, next_request: Callable[[], tuple[int, bytes]], connections: int, warm_s: float, seconds: float
) -> Run:
    """Keep `connections` requests in flight for warm_s + seconds; only the latter is measured.

    A server too slow for `connections` answers in that time is measured for longer, up to STRETCH times.
    Raises UnavailableError when a connection ends, or when answers stay away for DRAIN_S after the end.
    """
    loop = asyncio.get_running_loop()
    seen, idle = Run(), asyncio.Event()
    begin = time.perf_counter() + warm_s
    end, latest = begin + seconds, begin + STRETCH * seconds
    in_flight, ended = connections, loop.create_future()

    def finished(connection: Connection, status: int, head: bytes, body: bytes) -> None:
        """Count an answer, judge it if it is to be compared, and send the connection's next request while there is time."""
        nonlocal in_flight
        now = time.perf_counter()
        measuring = now < end or (len(seen.latencies_ms) < connections and now < latest)
        if status != 200:
            seen.errors[f"{status}: {body[:ERROR_WIDTH].decode(errors='replace')}"] += 1
        else:
            seen.done += 1
            if begin <= now and measuring:
                seen.seconds = max(seconds, now - begin)
                seen.latencies_ms.append(1000 * (now - connection.sent))
            if len(seen.samples) < SAMPLES:
                seen.samples.append((connection.number, headers_of(head), body))
        if measuring:
            connection.send(*next_request())
        else:
            in_flight -= 1
            if not in_flight:
                idle.set()

    def lost() -> None:
        """Fail the run: an answer is owed that will never come."""
        if not ended.done():
            ended.set_exception(UnavailableError("the server closed a connection with a request in flight"))

    made = [await loop.create_connection(lambda: Connection(finished, lost), host, port) for _ in range(connections)]
    try:
        for _, connection in made:
            connection.send(*next_request())
        waiting = asyncio.ensure_future(idle.wait())
        await asyncio.wait(
            {waiting, ended}, timeout=warm_s + STRETCH * seconds + DRAIN_S, return_when=asyncio.FIRST_COMPLETED
        )
        waiting.cancel()
        if ended.done():
            ended.result()
        if not idle.is_set():
            raise UnavailableError(f"{in_flight} requests had no answer {DRAIN_S:g} s after the end")
    finally:
        for transport, _ in made:
            transport.close()
        ended.cancel()
    return seen
