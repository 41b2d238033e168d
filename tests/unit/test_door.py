"""The door of our HTTP servers: callers who say nothing, or never end, cost themselves a place and nobody else.

Told on both event loops, since TLS that begins behind the door is another thing on each.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from coordinator import door
from coordinator.door import block_of
from coordinator.embedded.nats_server import TlsFiles
from coordinator.identity.authority import Authority, load_or_create_key
from coordinator.identity.https import server_tls
from coordinator.serving import serving

EACH, MOST = 8, 12
LOOPS: dict[str, Callable[[Coroutine[Any, Any, None]], None]] = {"asyncio": asyncio.run, "uvloop": uvloop.run}
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
every_loop = pytest.mark.parametrize("run", LOOPS.values(), ids=LOOPS)


class App:
    """Answers {}; a request for /wait only when told, one for /much with much."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.waiting = self.ended = 0
        self.peers: list[bytes | None] = []
        self._moved = asyncio.Event()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return when it holds; looked at after each request's begin and end."""
        async with asyncio.timeout(5):
            while not holds():
                self._moved.clear()
                await self._moved.wait()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.peers.append(scope["state"]["peer"])
        if scope["path"] == "/wait":
            self.waiting += 1
            self._moved.set()
            await self.go.wait()
        body = bytes(32 << 20) if scope["path"] == "/much" else b"{}"
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        for at in range(0, len(body), 1 << 20):
            await send({"type": "http.response.body", "body": body[at : at + (1 << 20)], "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        self.ended += 1
        self._moved.set()


@contextlib.asynccontextmanager
async def served(context: ssl.SSLContext | None = None) -> AsyncIterator[tuple[App, int]]:
    app = App()
    async with serving(app, "127.0.0.1", 0, connections=MOST, each=EACH, context=context) as port:
        yield app, port
        app.go.set()


async def caller(
    port: int, source: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0), ssl=tls)


async def answer(port: int, source: str = "127.0.0.1", tls: ssl.SSLContext | None = None, say: bytes = GET) -> bytes:
    """What comes back for some bytes, up to the end of a small answer."""
    reader, writer = await caller(port, source, tls)
    try:
        writer.write(say)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        return head + await reader.readexactly(length)
    finally:
        writer.close()


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What is left to read until the other side ends the connection; a reset ends it, too."""
    data = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5):
            while piece := await reader.read(1 << 16):
                data += piece
    return data


@pytest.fixture
def tls(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context and a client's with a certificate of its own, both by one CA."""
    authority = Authority.open(tmp_path)
    for name, hosts in (("server", ["127.0.0.1"]), ("pi-1", None)):
        key = load_or_create_key(tmp_path / f"{name}.key").public_key()
        (tmp_path / f"{name}.pem").write_bytes(authority.issue_infrastructure(name, key, hosts))
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    client.load_cert_chain(tmp_path / "pi-1.pem", tmp_path / "pi-1.key")
    return server_tls(TlsFiles(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ca.pem")), client


@every_loop
def test_half_open_callers_of_one_address_do_not_starve_it_nor_others(run: Any) -> None:
    async def story() -> None:
        async with served() as (_, port):
            crowd = [await caller(port) for _ in range(3 * EACH)]
            for _, writer in crowd[::2]:
                writer.write(b"GET / HTT")
            assert b" 200 " in await answer(port, "127.0.0.1")
            assert b" 200 " in await answer(port, "127.0.0.2")
            assert await ended(crowd[0][0]) == b"", "the oldest gave its place"
            for _, writer in crowd:
                writer.close()

    run(story())


@every_loop
def test_callers_who_never_shake_hands_do_not_starve_those_who_do(run: Any, tls: Any) -> None:
    server, client = tls

    async def story() -> None:
        async with served(server) as (app, port):
            crowd = [await caller(port, f"127.0.0.{2 + i % 3}") for i in range(3 * MOST)]
            assert b" 200 " in await answer(port, tls=client)
            assert app.peers[0] is not None, "the certificate is the application's to see"
            assert await ended(crowd[0][0]) == b""
            for _, writer in crowd:
                writer.close()

    run(story())


@every_loop
def test_a_request_in_work_keeps_its_place_and_who_comes_when_all_do_is_turned_away(run: Any) -> None:
    async def story() -> None:
        async with served() as (app, port):
            at_work = [await caller(port) for _ in range(EACH)]
            for _, writer in at_work:
                writer.write(GET.replace(b"/ ", b"/wait "))
            await app.until(lambda: app.waiting == EACH)
            assert await ended((await caller(port))[0]) == b"", "its address has no place left"
            assert b" 200 " in await answer(port, "127.0.0.2"), "another's has"
            app.go.set()
            for reader, writer in at_work:
                assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
                writer.close()

    run(story())


@every_loop
def test_a_head_that_trickles_and_a_handshake_that_does_are_ended_in_time(run: Any, tls: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(door, "HEAD_S", 0.1)
    monkeypatch.setattr(door, "HANDSHAKE_S", 0.1)
    monkeypatch.setattr(door, "LOOK_S", 0.02)

    async def story() -> None:
        clock = asyncio.get_running_loop().time
        async with served() as (_, port), served(tls[0]) as (_, secure):
            for letters, where in ((b"GET / HTTP/1.1\r\nX: " + b"x" * 400, port), (b"\x16\x03\x01\x02" * 100, secure)):
                reader, writer = await caller(where)
                begun = clock()
                with contextlib.suppress(ConnectionError):
                    for letter in letters:
                        writer.write(bytes([letter]))
                        await writer.drain()
                        await asyncio.sleep(0.005)
                        if reader.at_eof() or writer.is_closing():
                            break
                    else:
                        pytest.fail("all was taken, however slowly it came")
                assert await ended(reader) == b"", "half a head is owed no answer"
                assert clock() - begun >= 0.09, "it had its time"
                writer.close()

    run(story())


TOO_MUCH = {
    "a long field": (b"GET / HTTP/1.1\r\nX: " + b"x" * 600_000, 431),
    "many fields": (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000, 431),
    "a long path": (b"GET /" + b"x" * 600_000, 431),
    "trailers without end": (
        b"POST /wait HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + b"T: t\r\n" * 100_000, 431,
    ),
    "many at once": (GET.replace(b"/ ", b"/wait ") * 100, 400),
    "not HTTP": (b"\x00\x01\x02 nonsense\r\n\r\n", 400),
}  # fmt: skip


@every_loop
def test_more_than_a_request_is_refused_in_json_and_in_bounded_memory(run: Any) -> None:
    async def story() -> None:
        async with served() as (_, port):
            for case, (say, status) in TOO_MUCH.items():
                reader, writer = await caller(port)
                writer.write(say)
                reply = await ended(reader)  # nothing at all where the reset overtakes it
                writer.close()
                assert not reply or reply.startswith(b"HTTP/1.1 %d " % status), (case, reply[:100])
                assert not reply or json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
                assert b" 200 " in await answer(port), f"after {case}, the next is answered"
            assert await answer(port, say=TOO_MUCH["not HTTP"][0])

    run(story())


@every_loop
def test_who_does_not_read_an_answer_is_ended(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(door, "UNREAD_S", 0.1)
    monkeypatch.setattr(door, "LOOK_S", 0.02)

    async def story() -> None:
        async with served() as (app, port):
            reader, writer = await caller(port)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(GET.replace(b"/ ", b"/much "))
            await app.until(lambda: app.ended == 1)
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert len(await ended(reader)) < 32 << 20, "the rest was never sent"
            writer.close()
            assert b" 200 " in await answer(port)

    run(story())


def test_an_ipv6_network_is_one_address() -> None:
    assert block_of(("2001:db8::1", 1)) == block_of(("2001:db8::ffff:2", 2)) != block_of(("2001:db8:0:1::1", 1))
    assert block_of(("::ffff:192.0.2.1", 1)) == block_of(("192.0.2.1", 1)) == "192.0.2.1"
    assert block_of(("fe80::1%eth0", 1)) == str(ipaddress.ip_network("fe80::/64"))
    assert block_of(None) == block_of("") == block_of(("nonsense", 1)) == ""
