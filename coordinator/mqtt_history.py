"""What the journal knows of devices' requests: those of an earlier run are not run again, and their replies are sent."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import orjson

from bmoe.protocol.errors import InputError
from coordinator.catalogue import Catalogue
from coordinator.jobs import Answered
from coordinator.journal import Journal, Row
from coordinator.recent import KEEP_S
from coordinator.records import unpack_answered
from coordinator.recover import Outcome

Respond = Callable[[Answered], Awaitable[bytes]]


def reply_to(device: str, key: bytes) -> str:
    """How the journal names where a reply goes: the device, and behind it which request it is, if that has an id."""
    return f"{device} {key.hex()}" if key else device


class History:
    """The journal, as requests over MQTT ask it. `respond` makes an answer's reply."""

    def __init__(self, journal: Journal, catalogue: Catalogue, respond: Respond) -> None:
        self._journal, self._catalogue, self._respond = journal, catalogue, respond
        self._started = time.monotonic()

    async def earlier(self, tenant: str, client_id: str, where: str) -> tuple[bool, bytes | None]:
        """(True, reply, or None while it is in work) if this very request came before; (False, None) otherwise.

        What came in this run is known already, and after KEEP_S nothing else counts: then nobody is asked.
        """
        if time.monotonic() - self._started > KEEP_S:
            return False, None
        row = await self._journal.latest(tenant, client_id, where)
        too_old = row is not None and row.received_ms < time.time_ns() // 1_000_000 - KEEP_S * 1000
        if row is None or too_old or row.status == "failed":
            return False, None
        try:
            return True, await self._reply(row)
        except InputError:  # its model is gone
            return False, None

    def sent(self, request: str) -> None:
        """The broker has the reply to a request."""
        self._journal.replied(bytes.fromhex(request))

    async def outcome(self, outcome: Outcome) -> tuple[str, bytes, str]:
        """(device, reply, the request's own id) of a request that an earlier run left."""
        row = outcome.row
        device = row.reply_to.split(" ")[0]
        if outcome.answered is not None:
            return device, await self._respond(outcome.answered), row.id.hex()
        known = {"id": row.client_id} if row.client_id else {}
        values = {**known, "request": row.id.hex(), "error": outcome.reason, "status": 503}
        return device, orjson.dumps(values), row.id.hex()

    async def _reply(self, row: Row) -> bytes | None:
        if row.outcome is None:
            return None
        return await self._respond(unpack_answered(row.outcome, self._catalogue.version))
