"""Whom the agent believes, kept fresh: the registrar's statements on coordinators, and our own certificate renewed."""

from __future__ import annotations

import asyncio
import json
import logging
import time

from bmoe.protocol.errors import BmoeError, InputError
from bmoe.protocol.files import write_durably
from bmoe.protocol.messages import Member
from bmoe.protocol.threads import in_thread
from edge_agent.admit import coordinators_of
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity, certified
from edge_agent.logs import event

log = logging.getLogger("bmoe.agent")
REFRESH_PAUSE_S = 60.0
RENEWAL_PAUSE_S = 6 * 3600.0


class Trust:
    """The coordinators whose tasks we take and the ledger's epoch, as last stated by the registrar."""

    def __init__(self, identity: Identity, fleet: FleetClient) -> None:
        self._identity, self._fleet = identity, fleet
        self.coordinators = coordinators_of(identity.members)
        self.epoch = identity.epoch
        self._asked_at = -REFRESH_PAUSE_S
        self._asking: asyncio.Task[None] | None = None

    def refresh_soon(self) -> None:
        """Ask the fleet server for the statements, unless that was done within the last minute."""
        if time.monotonic() - self._asked_at >= REFRESH_PAUSE_S:
            self._asked_at = time.monotonic()
            self._asking = asyncio.ensure_future(self._refresh())

    async def _refresh(self) -> None:
        try:
            reply = await in_thread(lambda: self._fleet.get_json("/v1/members"))
            self._believe(list(certified(reply.get("members"), self._identity.registrar, self._identity.ledger)))
        except BmoeError as error:
            log.warning(event("members_not_refreshed", reason=error))

    def _believe(self, members: list[Member]) -> None:
        known = coordinators_of(members)
        if known:
            self.coordinators = known
        # Epochs only grow: an old list, served again, must not take us back.
        self.epoch = max([self.epoch, *(member.epoch for member in members)])

    async def keep_certificate(self) -> None:
        """For ever: renew our certificate once two thirds of its life are over. The link reads it when it reconnects."""
        while True:
            try:
                if await in_thread(lambda: is_due(self._identity.certificate.read_bytes())):
                    await in_thread(self._renew)
            except (BmoeError, OSError, ValueError) as error:
                log.warning(event("certificate_not_renewed", reason=error))
            await asyncio.sleep(RENEWAL_PAUSE_S)

    def _renew(self) -> None:
        from cryptography import x509

        body = json.dumps({"csr": self._identity.csr.read_text()}).encode()
        pem = str(self._fleet.post_json("/v1/renew", body).get("certificate")).encode()
        old, new = (x509.load_pem_x509_certificate(p) for p in (self._identity.certificate.read_bytes(), pem))
        if (new.subject, new.public_key()) != (old.subject, old.public_key()):
            raise InputError("the gateway renewed another certificate than ours")
        write_durably(self._identity.certificate, pem)
        log.info(event("certificate_renewed", until=new.not_valid_after_utc.isoformat()))


def is_due(pem: bytes, now_s: float | None = None) -> bool:
    """Whether a certificate is past two thirds of its life. Raises ValueError for bytes that are none."""
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(pem)
    begin, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return (time.time() if now_s is None else now_s) > begin + (end - begin) * 2 / 3
