"""The gateway's real fleet server on a port of its own, with a ledger that takes every entry: for tests of the agent."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding
from identity_helpers import WillingLedger

from bmoe.protocol.join_token import JoinToken
from bmoe.protocol.keys import Signer
from coordinator.embedded.nats_server import TlsFiles
from coordinator.identity.authority import Authority, load_or_create_key, spki_digest
from coordinator.identity.directory import Directory, Known
from coordinator.identity.enrol import Enroller, certify
from coordinator.identity.https import fleet_serving, server_tls
from coordinator.identity.server import Fleet, make_app
from coordinator.identity.tokens import TokenStore

NOW_S = 1_800_000_000


class FleetServer:
    """Folder, keys and what the server serves; `url` once it runs. `requests` are the paths asked for, in order."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.registrar, self.coordinator = folder, Signer.generate(), Signer.generate()
        self.directory = Directory()
        self.ledger = WillingLedger(self.directory, self.registrar)
        self.tokens = TokenStore(folder / "tokens.db")
        self.authority = Authority.open(folder)
        self.enroller = Enroller(self.authority, self.registrar, self.tokens, self.directory, self.ledger)
        self.releases: dict[bytes, bytes] = {}
        self.blobs = folder / "blobs"
        self.blobs.mkdir()
        self.requests: list[str] = []
        self.swallow = 0
        self.url = ""
        self._certify("coordinator", "coordinator", self.coordinator.public_key)

    def _certify(self, name: str, role: str, key: bytes) -> None:
        known = Known(name, role, "operator", key, bytes(32))
        statement = certify(self.registrar, self.ledger, known, "", 0)
        self.directory.enrolled(_member(statement), statement)

    def publish(self, blob: bytes) -> bytes:
        digest = hashlib.sha256(blob).digest()
        (self.blobs / digest.hex()).write_bytes(blob)
        return digest

    def token(self, name: str | None = None, ttl_s: int = 600, ago_s: int = 0) -> str:
        import time

        token, secret = self.tokens.create(name, "acme", "", ttl_s, int((time.time() - ago_s) * 1000))
        pin = hashlib.sha256(self.authority.certificate.public_bytes(Encoding.DER)).digest()
        return JoinToken(self.url, token, secret, pin).text()

    @contextlib.asynccontextmanager
    async def running(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[FleetServer]:
        key = load_or_create_key(self.folder / "server.key")
        pem = self.authority.issue_infrastructure("bmoe-server", key.public_key(), [host])
        (self.folder / "server.pem").write_bytes(pem)
        files = TlsFiles(self.folder / "server.pem", self.folder / "server.key", self.folder / "ca.pem")
        fleet = Fleet(
            self.authority, self.directory, self.enroller, self.blobs, self.releases.get, lambda task: None,
            self.registrar.public_key, self.ledger.ledger, self.ledger.epoch, ("127.0.0.1", 1883),
            lambda *args, **facts: None,
        )  # fmt: skip
        async with fleet_serving(self._watched(make_app(fleet)), host, port, server_tls(files)) as port:
            self.url = f"https://{host}:{port}"
            yield self
        self.tokens.close()

    def _watched(self, app: Any) -> Any:
        """Notes each request, and lets the answers to `swallow` of them get lost after they took effect."""

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            self.requests.append(f"{scope['method']} {scope['path']}")
            if self.swallow and scope["path"] == "/v1/enrol":
                self.swallow -= 1

                async def lost(message: Any) -> None:
                    """The head of the answer, then the connection breaks."""
                    if message["type"] == "http.response.start":
                        return await send({**message, "headers": [(b"content-length", b"100000")]})
                    raise ConnectionError("the answer got lost")

                return await app(scope, receive, lost)
            await app(scope, receive, send)

        return watched


def _member(statement: bytes) -> Any:
    from bmoe.protocol.messages import Member, open_message

    return open_message(Member, statement).header


def device_spki(key_file: Path) -> bytes:
    """SPKI digest of a TLS key file."""
    return spki_digest(load_or_create_key(key_file).public_key())
