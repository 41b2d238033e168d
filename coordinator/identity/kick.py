"""Ending live sessions on the broker: of one name that was revoked, or of all that would be refused today.

Source: NATS system account requests CONNZ and KICK. Every server of a cluster answers a PING, so all are reached.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError

from bmoe.protocol.errors import UnavailableError

PAGE = 1024
ANSWER_S = 0.5  # how long the servers of a cluster have to answer a PING
Report = Callable[..., Any]
Refused = Callable[[str], "str | None"]


class Kicker:
    """Ends sessions through a connection of the system account; the broker then publishes the session's last will."""

    def __init__(self, system: Client, report: Report) -> None:
        self._system, self._report = system, report

    async def drop(self, name: str, reason: str) -> int:
        """End the sessions of `name`; how many there were. Raises UnavailableError when no server answers."""
        return await self.sweep(lambda found: reason if found == name else None, {"user": name})

    async def sweep(self, refused: Refused, narrow: dict[str, Any] | None = None) -> int:
        """End every MQTT session for whose user `refused(name)` gives a reason; how many there were.

        The user is the certificate's name, as the callout set it. Raises UnavailableError when no server answers.
        """
        ended, offset, more = 0, 0, True
        while more:
            more = False
            query = {"auth": True, "acc": "FLEET", "limit": PAGE, "offset": offset, **(narrow or {})}
            async for server, page in self._ask("CONNZ", query):
                found = page.get("connections") or []
                ended += sum([await self._judge(server, connection, refused) for connection in found])
                more = more or len(found) == PAGE
            offset += PAGE
        return ended

    async def _judge(self, server: str, connection: dict[str, Any], refused: Refused) -> bool:
        name, client_id = connection.get("authorized_user", ""), connection.get("mqtt_client", "")
        reason = refused(name)
        if reason is None:
            return False
        body = json.dumps({"cid": connection["cid"]}).encode()
        await self._system.request(f"$SYS.REQ.SERVER.{server}.KICK", body, timeout=ANSWER_S)
        self._report("session_ended", device=name, client_id=client_id, reason=reason)
        return True

    async def _ask(self, what: str, query: dict[str, Any]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(server id, answer) of each server, as they come."""
        answers = 0
        try:
            subscription = await self._system.subscribe(self._system.new_inbox())
            try:
                body = json.dumps(query).encode()
                await self._system.publish(f"$SYS.REQ.SERVER.PING.{what}", body, reply=subscription.subject)
                while True:
                    answer = json.loads((await subscription.next_msg(timeout=ANSWER_S)).data)
                    if "error" in answer:
                        raise UnavailableError(f"the broker refuses {what}: {answer['error']}")
                    answers += 1
                    yield answer["server"]["id"], answer.get("data") or {}
            except asyncio.TimeoutError:
                pass
            finally:
                await subscription.unsubscribe()
        except (NatsError, OSError, ValueError, LookupError) as error:
            raise UnavailableError(f"the broker's {what} failed: {error or type(error).__name__}") from error
        if not answers:
            raise UnavailableError(f"no broker answered {what} within {ANSWER_S:g} s")
