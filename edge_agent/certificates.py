"""This device's TLS certificates: its own, and one for each further MQTT session, renewed over two thirds of their life.

A session has a certificate of its own, CN=NAME:SESSION, because a broker that takes the client id from the certificate,
as Mosquitto does here, gives each certificate one session.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bmoe.protocol.errors import BmoeError, InputError
from bmoe.protocol.files import write_durably
from bmoe.protocol.threads import in_thread
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity
from edge_agent.logs import event

log = logging.getLogger("bmoe.agent")
RENEWAL_PAUSE_S = 6 * 3600.0
RENEWAL_AGAIN_S = 300.0  # a board that is seldom online must not miss its hour
REMEDY = "it cannot be renewed any more: get a new token, then bmoe-agent join TOKEN --force"
AGAIN_S = (1.0, 30.0)  # the first pause of one that must have a certificate, and the longest


async def keep(identity: Identity, fleet: FleetClient, sessions: Iterable[str] = ("",)) -> None:
    """For ever: renew these certificates when they are due. A link reads its own when it reconnects."""
    while True:
        done = [await _try(identity, fleet, session) for session in sessions]
        await asyncio.sleep(RENEWAL_PAUSE_S if all(done) else RENEWAL_AGAIN_S)


async def wait_for(identity: Identity, fleet: FleetClient, session: str) -> None:
    """Return once a session has its certificate, which only the gateway can give."""
    pause = AGAIN_S[0]
    while True:
        await _try(identity, fleet, session)
        if identity.certificate_of(session).exists():
            return
        await asyncio.sleep(pause)
        pause = min(2 * pause, AGAIN_S[1])


async def _try(identity: Identity, fleet: FleetClient, session: str) -> bool:
    try:
        await in_thread(lambda: ensure(identity, fleet, session))
    except (BmoeError, OSError, ValueError) as error:
        left = seconds_left(identity.certificate_of(session))
        facts = {"session": session, "reason": error, "days_left": round(left / 86400, 1)}
        log.warning(event("certificate_not_renewed", **facts, **({"do": REMEDY} if over(identity.certificate) else {})))
        return False
    return True


def seconds_left(path: Path) -> float:
    """How long a certificate is still valid; negative where it is over, 0 where there is none that can be read."""
    try:
        return float(_load(path.read_bytes()).not_valid_after_utc.timestamp()) - time.time()
    except (OSError, ValueError, InputError):
        return 0.0


def over(path: Path) -> str:
    """The day on which a certificate ended, "" where it has not, or cannot be read."""
    with contextlib.suppress(OSError, ValueError, InputError):
        end = _load(path.read_bytes()).not_valid_after_utc
        return f"{end:%Y-%m-%d}" if end.timestamp() < time.time() else ""
    return ""


def ensure(identity: Identity, fleet: FleetClient, session: str = "") -> None:
    """Have the gateway issue a certificate that is missing or due. Raises UnavailableError, RefusedError, InputError."""
    path = identity.certificate_of(session)
    if not path.exists() or is_due(path.read_bytes()):
        renew(identity, fleet, session)


def renew(identity: Identity, fleet: FleetClient, session: str = "") -> None:
    """Have the gateway issue a certificate now; raises as `ensure` does."""
    path = identity.certificate_of(session)
    body = {"csr": identity.csr.read_text(), **({"session": session} if session else {})}
    pem = str(fleet.post_json("/v1/renew", json.dumps(body).encode()).get("certificate")).encode()
    new, own = _load(pem), _load(identity.certificate.read_bytes())
    name = f"{identity.name}:{session}" if session else identity.name
    if new.subject.rfc4514_string() != f"CN={name}" or new.public_key() != own.public_key():
        raise InputError(f"the gateway issued another certificate than ours, CN={name}")
    write_durably(path, pem)
    log.info(event("certificate_renewed", session=session, until=new.not_valid_after_utc.isoformat()))


def is_due(pem: bytes, now_s: float | None = None) -> bool:
    """Whether a certificate is past two thirds of its life. Raises ValueError for bytes that are none."""
    certificate = _load(pem)
    begin, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return (time.time() if now_s is None else now_s) > begin + (end - begin) * 2 / 3


def _load(pem: bytes) -> Any:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(pem)
    except x509.InvalidVersion as error:  # not a ValueError, as everything else that may be wrong with it is
        raise InputError(f"the certificate cannot be read: {error}") from None
