"""The broker's auth callout: every connection that is not our own is put to us, and gets its permissions or its refusal.

Source: NATS ADR-26. The broker sends a token with what it knows of the connection (client id, verified certificate
chain) and waits at most its authorization timeout; a callout that is away refuses newcomers and leaves sessions alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cryptography import x509
from nats.aio.client import Client
from nats.aio.msg import Msg

from bmoe.protocol.errors import BmoeError, MessageError, RefusedError
from coordinator.identity.admission import CertificateFacts, Permissions, check_certificate, facts_of
from coordinator.identity.directory import Directory
from coordinator.identity.jwt import Issuer, read_claims

SUBJECT = "$SYS.REQ.USER.AUTH"
QUEUE = "bmoe-callout"
ACCOUNT = "FLEET"
Report = Callable[..., Any]


class Callout:
    """Answers the broker out of a directory. `report(event, **facts)` hears of every refusal, with names and reason."""

    def __init__(
        self, issuer: Issuer, directory: Directory, report: Report, clock: Callable[[], float] = time.time
    ) -> None:
        self._issuer, self._directory, self._report, self._clock = issuer, directory, report, clock

    async def serve(self, client: Client) -> None:
        """Answer on this connection from now on; it renews the subscription itself when it reconnects."""
        await client.subscribe(SUBJECT, queue=QUEUE, cb=self._on_request)
        await client.flush()

    def answer(self, request: bytes) -> bytes:
        """The signed response to one request; empty (which is a refusal too) where the request cannot be read."""
        try:
            asked = read_claims(request).get("nats")
            server, user = _text(asked, "server_id", "id"), _text(asked, "user_nkey")
        except MessageError as error:
            self._report("callout_request_unreadable", reason=str(error))
            return b""
        client_id, host = _text(asked, "client_info", "mqtt_id"), _text(asked, "client_info", "host")
        facts: CertificateFacts | None = None
        try:
            facts = _certificate(asked)
            kind = _text(asked, "client_info", "type")
            permissions = check_certificate(facts, client_id, kind, self._directory, self._clock())
        except BmoeError as error:
            device = facts.name if facts else ""
            self._report("connect_refused", device=device, client_id=client_id, address=host, reason=str(error))
            return self._respond(user, server, error=str(error))
        assert facts is not None
        return self._respond(user, server, jwt=self._user(user, facts, permissions))

    def _respond(self, user: str, server: str, **outcome: str) -> bytes:
        nats = {"type": "authorization_response", **outcome}
        return self._issuer.mint(user, server, nats, now_s=int(self._clock())).encode()

    def _user(self, user: str, facts: CertificateFacts, permissions: Permissions) -> str:
        """The connection's user token. Its end is the certificate's: the broker ends the session then."""
        nats: dict[str, Any] = {
            "type": "user",
            "pub": _rule(permissions.publish),
            "sub": _rule(permissions.subscribe),
            "subs": permissions.subscriptions,
            "data": -1,
            "payload": -1,
            "allowed_connection_types": ["MQTT"],
        }
        now_s = int(self._clock())
        return self._issuer.mint(user, ACCOUNT, nats, now_s=now_s, name=facts.name, exp=facts.end_s)

    async def _on_request(self, message: Msg) -> None:
        try:
            answer = self.answer(message.data)
        except Exception as error:  # one request must not end the answering of all others
            self._report("callout_failed", reason=repr(error))
            answer = b""
        await message.respond(answer)


def _rule(subjects: tuple[str, ...]) -> dict[str, list[str]]:
    # To NATS an empty list of what is allowed means everything.
    return {"allow": list(subjects)} if subjects else {"deny": [">"]}


def _certificate(asked: Any) -> CertificateFacts | None:
    """The leaf of the first verified chain. What the broker lists under "certs" it has not verified: never trusted."""
    chains = asked.get("client_tls", {}).get("verified_chains") if isinstance(asked.get("client_tls"), dict) else None
    try:
        pem = chains[0][0] if chains else None
        return None if pem is None else facts_of(x509.load_pem_x509_certificate(pem.encode()))
    except (ValueError, TypeError, LookupError, AttributeError, x509.InvalidVersion) as error:
        raise RefusedError(f"the client certificate cannot be read: {error or type(error).__name__}") from None


def _text(asked: Any, *path: str) -> str:
    value = asked
    for key in path:
        value = value.get(key, "") if isinstance(value, dict) else ""
    if not isinstance(value, str) or (not value and path[0] != "client_info"):
        raise MessageError(f"the request has no text at {'.'.join(path)}")
    return value
