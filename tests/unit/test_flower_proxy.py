"""The door for SuperNodes with a TLS server behind it: what passes, what an attacker of the fleet's network can cost."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.embedded.nats_server import TlsFiles
from coordinator.flower import proxy as module
from coordinator.flower.proxy import Proxy
from coordinator.identity.authority import Authority, load_or_create_key
from coordinator.identity.https import server_tls
from coordinator.serving import serving

MUCH = 24 << 20


class SuperLink:
    """What stands behind the door: says what was asked of it, and sends much for pull-object."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[bytes, bytes], bytes]] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.asked.append((scope["path"], dict(scope["headers"]), body))
        count = MUCH if scope["path"].endswith("pull-object") else 3
        headers = [(b"content-length", b"%d" % count), (b"x-flwr", b"1")]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        for _ in range(0, count, 1 << 20):
            await send({"type": "http.response.body", "body": bytes(min(count, 1 << 20)), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def site(folder: Path) -> AsyncIterator[tuple[SuperLink, Proxy, int, ssl.SSLContext]]:
    """A SuperLink behind the door, the door's port, and a context for its callers."""
    authority = Authority.open(folder)
    key = load_or_create_key(folder / "server.key").public_key()
    (folder / "server.pem").write_bytes(authority.issue_infrastructure("server", key, ["127.0.0.1"]))
    files = TlsFiles(folder / "server.pem", folder / "server.key", folder / "ca.pem")
    behind = SuperLink()
    async with serving(behind, "127.0.0.1", 0, connections=64, each=64, context=server_tls(files)) as port:
        proxy = Proxy(port, folder / "ca.pem")
        async with serving(proxy, "127.0.0.1", 0, connections=64, each=64, context=server_tls(files)) as door:
            yield behind, proxy, door, ssl.create_default_context(cafile=str(folder / "ca.pem"))
        await proxy.close()


async def ask(door: int, tls: ssl.SSLContext, path: str, body: bytes = b"", source: str = "127.0.0.1") -> bytes:
    """The whole answer to a POST."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door, ssl=tls, local_addr=(source, 0))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Sign: s\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        writer.write(head.encode() + body)
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


async def test_a_supernodes_request_and_its_answer_pass_whole(tmp_path: Path) -> None:
    async with site(tmp_path) as (behind, proxy, door, tls):
        answer = await ask(door, tls, "/v1/fleet/pull-messages", b"abc")
        assert answer.startswith(b"HTTP/1.1 201") and answer.endswith(b"\r\n\r\n\0\0\0") and b"x-flwr: 1" in answer
        ((path, headers, body),) = behind.asked
        assert (path, body, headers[b"x-sign"]) == ("/v1/fleet/pull-messages", b"abc", b"s")
        assert len(await ask(door, tls, "/v1/fleet/pull-object")) > MUCH
        assert proxy.figures() | {"requests": 2, "bytes in": 3, "bytes out": MUCH + 3} == proxy.figures()


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/../control/stop-run", "/"]
)
async def test_nothing_but_the_fleets_paths_reaches_the_superlink(tmp_path: Path, path: str) -> None:
    async with site(tmp_path) as (behind, proxy, door, tls):
        assert (await ask(door, tls, path)).startswith(b"HTTP/1.1 403")
        assert behind.asked == [] and proxy.figures()["refused"] == 1


async def test_a_body_larger_than_any_supernodes_is_refused(tmp_path: Path) -> None:
    async with site(tmp_path) as (behind, _, door, tls):
        answer = await ask(door, tls, "/v1/fleet/push-object", bytes(module.BODY_MAX + 1))
        assert answer.startswith(b"HTTP/1.1 413") and behind.asked == []


async def test_who_sends_more_than_its_share_fills_no_disk_and_others_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BURST_BYTES", 3000)
    monkeypatch.setattr(module, "BYTES_PER_S", 1)
    async with site(tmp_path) as (_, _, door, tls):
        answers = [await ask(door, tls, "/v1/fleet/push-object", bytes(1000)) for _ in range(5)]
        assert [answer[9:12] for answer in answers] == [b"201", b"201", b"201", b"429", b"429"]
        assert (await ask(door, tls, "/v1/fleet/push-object", bytes(1000), "127.0.0.2")).startswith(b"HTTP/1.1 201")


async def test_bodies_that_trickle_hold_up_their_own_address_and_end_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BODY_S", 0.5)
    async with site(tmp_path) as (behind, _, door, tls):
        slow = []
        for _ in range(module.SLOTS + 4):
            reader, writer = await asyncio.open_connection("127.0.0.1", door, ssl=tls)
            writer.write(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
            slow.append((reader, writer))
        assert (await ask(door, tls, "/v1/fleet/pull-messages", source="127.0.0.2")).startswith(b"HTTP/1.1 201")
        heads = [await asyncio.wait_for(reader.readuntil(b"\r\n"), 10) for reader, _ in slow]
        assert {head[9:12] for head in heads} == {b"408"} and len(behind.asked) == 1
        for _, writer in slow:
            writer.close()


async def test_a_superlink_that_is_away_is_said_to_be(tmp_path: Path) -> None:
    async with site(tmp_path) as (_, proxy, door, tls):
        proxy._url = "https://127.0.0.1:9"
        assert (await ask(door, tls, "/v1/fleet/pull-messages")).startswith(b"HTTP/1.1 503")
