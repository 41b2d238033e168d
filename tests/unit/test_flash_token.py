"""A token is asked about before a card is made with it, at the gateway's real server; and asking costs it nothing."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_gateway import FleetServer
from cryptography.hazmat.primitives.serialization import Encoding

from bmoe.protocol.errors import BmoeError, RefusedError, UnavailableError
from bmoe.protocol.join_token import JoinToken, parse_token
from coordinator.flash import gateway
from coordinator.flash.gateway import ask
from coordinator.identity.authority import Authority, load_or_create_key
from edge_agent.join import join

Prepare = Callable[[FleetServer], Awaitable[str]]


def asked(tmp_path: Path, prepare: Prepare, name: str = "") -> Any:
    """What `ask` says of the token that `prepare(server)` gives, or the error it raises."""

    async def scene() -> Any:
        async with FleetServer(tmp_path / "gateway").running() as server:
            token = await prepare(server)
            try:
                return await asyncio.to_thread(ask, parse_token(token), name)
            except BmoeError as error:
                return error

    return asyncio.run(scene())


async def joined(server: FleetServer, token: str) -> str:
    """The name under which a board joins with a token."""
    folder = server.folder.parent / token[-8:]
    return (await asyncio.to_thread(join, folder, token, name=None, gateway=None, force=False)).name


def test_a_good_token_is_told_with_its_name_owner_and_end_and_joins_afterwards(tmp_path: Path) -> None:
    names: list[str] = []

    async def prepare(server: FleetServer) -> str:
        token, other = server.token("kitchen", ttl_s=3600), server.token("pantry")
        for _ in range(3):
            await asyncio.to_thread(ask, parse_token(other), "pantry")
        names.append(await joined(server, other))
        return token

    standing = asked(tmp_path, prepare)
    assert (standing.name, standing.owner, names) == ("kitchen", "acme", ["pantry"])
    assert 3500 < standing.expires_ms / 1000 - time.time() <= 3600


async def used(server: FleetServer) -> str:
    token = server.token("kitchen")
    await joined(server, token)
    return token


async def expired(server: FleetServer) -> str:
    token, secret = server.tokens.create("kitchen", "acme", "", 60, int(time.time() * 1000) - 3_600_000)
    return JoinToken(server.url, token, secret, server.authority.pin).text()


async def of_another_board(server: FleetServer) -> str:
    return server.token("pantry")


async def of_a_name_in_use(server: FleetServer) -> str:
    await used(server)
    return server.token("kitchen")


async def with_another_secret(server: FleetServer) -> str:
    token = parse_token(server.token("kitchen"))
    return JoinToken(token.url, token.token, bytes(16), token.pin).text()


async def of_another_gateway(server: FleetServer) -> str:
    token = parse_token(server.token("kitchen"))
    return JoinToken(token.url, token.token, token.secret, bytes(32)).text()


REFUSALS = [
    ("expired", expired, "kitchen", r"token [0-9a-f]{16} expired \d+ s ago"),
    ("used", used, "kitchen", r"token [0-9a-f]{16} was used already"),
    ("another board's", of_another_board, "kitchen", r"token [0-9a-f]{16} is for pantry, not for kitchen"),
    ("of a board that has joined", of_a_name_in_use, "", r"the name kitchen is taken by another signing key"),
    ("with another secret", with_another_secret, "", "the token is unknown here"),
    ("of another gateway", of_another_gateway, "", "is not the one that made this token: its CA is another"),
]


@pytest.mark.parametrize(("prepare", "name", "said"), [c[1:] for c in REFUSALS], ids=[c[0] for c in REFUSALS])
def test_a_token_that_would_not_join_is_refused_when_the_card_is_made(
    prepare: Prepare, name: str, said: str, tmp_path: Path
) -> None:
    told = asked(tmp_path, prepare, name)
    assert isinstance(told, RefusedError)
    with pytest.raises(RefusedError, match=said):
        raise told
    assert "\n" not in str(told)


def test_a_gateway_that_is_away_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "TIMEOUT_S", 0.5)
    with pytest.raises(UnavailableError, match="does not answer"):
        ask(JoinToken("https://127.0.0.1:1", bytes(8), bytes(16), bytes(32)), "")


def test_whoever_grinds_secrets_is_stopped_as_at_joining(tmp_path: Path) -> None:
    async def prepare(server: FleetServer) -> str:
        bad = parse_token(await with_another_secret(server))
        for _ in range(10):
            with pytest.raises(RefusedError):
                await asyncio.to_thread(ask, bad, "")
        return server.token("kitchen")

    assert "too many failed enrolments" in str(asked(tmp_path, prepare))


@pytest.mark.parametrize(
    "reply", [b"", b"[]", b"{}", b'{"name": 1}', b"\xff", b"[" * 5000, json.dumps({"error": 1}).encode()]
)
def test_a_gateway_that_answers_nonsense_is_one_error(reply: bytes) -> None:
    for status in (200, 403, 404, 500):
        with pytest.raises((UnavailableError, RefusedError)) as told:
            gateway._standing(status, reply, "https://192.0.2.7:8443")
        assert "\n" not in str(told.value)


@contextlib.contextmanager
def in_between(
    folder: Path, authority: Authority, said: bytes, host: str = "127.0.0.1"
) -> Iterator[tuple[str, list[bytes]]]:
    """A server with a certificate of `authority` for `host`, whose /v1/ca is `said`; its URL, and what was told to it."""
    told: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(said)

        def do_POST(self) -> None:
            told.append(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(json.dumps({"name": None, "owner": "ada", "expires_ms": 1}).encode())

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    key = load_or_create_key(folder / "server.key")
    (folder / "server.pem").write_bytes(authority.issue_infrastructure("bmoe-server", key.public_key(), [host]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_address[1]}", told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def authority_of_uneven_length(folder: Path) -> Authority:
    """One whose certificate's base64 ends with '=': a reader of base64 takes that for the end, whatever follows."""
    for number in range(100):
        place = folder / str(number)
        place.mkdir(parents=True)
        found = Authority.open(place)
        if len(found.certificate.public_bytes(Encoding.DER)) % 3:
            return found
    raise AssertionError("a hundred certificates of even length")


def test_who_stands_between_and_adds_a_ca_of_his_own_is_not_told_the_tokens_secret(tmp_path: Path) -> None:
    """He sends the pinned certificate, which is no secret, and behind it the one that his own certificate is by."""
    pinned, his = authority_of_uneven_length(tmp_path / "pinned"), authority_of_uneven_length(tmp_path / "his")
    refused = pytest.raises(RefusedError, match="is not for this address, or out of date")
    with in_between(tmp_path, his, pinned.pem + his.pem) as (url, told), refused:
        ask(JoinToken(url, bytes(8), bytes(16), pinned.pin), "")
    assert told == []


def test_a_gateway_whose_certificate_names_another_address_is_refused_as_the_board_would_be(tmp_path: Path) -> None:
    authority = authority_of_uneven_length(tmp_path / "ca")
    refused = pytest.raises(RefusedError, match="is not for this address")
    with in_between(tmp_path, authority, authority.pem, host="192.0.2.7") as (url, told), refused:
        ask(JoinToken(url, bytes(8), bytes(16), authority.pin), "")
    assert told == []
