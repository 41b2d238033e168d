"""Whom the agent believes, kept fresh: the registrar's statements on coordinators."""

from __future__ import annotations

import asyncio
import logging
import time

from bmoe.protocol.errors import BmoeError
from bmoe.protocol.messages import Member
from bmoe.protocol.threads import in_thread
from edge_agent.admit import coordinators_of
from edge_agent.fleet import FleetClient
from edge_agent.identity import Identity, certified
from edge_agent.logs import event

log = logging.getLogger("bmoe.agent")
REFRESH_PAUSE_S = 60.0


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
