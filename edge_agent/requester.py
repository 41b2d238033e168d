"""Asking the gateway over MQTT: a request on our own topic, its reply matched by id, on a session of its own."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from bmoe.protocol.errors import InputError, MessageError, RefusedError, UnavailableError
from bmoe.protocol.link import Link, LinkSettings
from bmoe.protocol.topics import request_topic, topic
from edge_agent.identity import Identity
from edge_agent.logs import event

log = logging.getLogger("bmoe.agent")
SESSION = "source"
# Statuses after which the same request may well succeed.
PASSING = (429, 503)


class Requester:
    """One session, NAME:source, beside the agent's own. Requests of one id at a time are one request."""

    def __init__(self, identity: Identity, keepalive_s: int) -> None:
        i = self._identity = identity
        settings = LinkSettings(
            i.broker_host,
            i.broker_port,
            f"{i.name}:{SESSION}",
            i.ca,
            i.certificate_of(SESSION),
            i.key,
            keepalive_s=keepalive_s,
        )
        self.link = Link(settings, on_message=self._on_message, on_up=self._on_up, on_down=self._on_down)
        self.link.subscribe(topic(i.name, "reply"))  # QoS 0: what got lost is asked again, and told again
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def ask(self, model: str, client_id: str, body: bytes, timeout_s: float) -> dict[str, Any]:
        """The gateway's reply to a request of that id.

        Raises UnavailableError if there is no link, no reply in time, or a reply that says to try again; InputError or
        RefusedError with what the gateway has against the request.
        """
        if not self.link.connected:
            raise UnavailableError("the link to the gateway is down")
        if client_id in self._waiting:
            raise UnavailableError(f"request {client_id} is in work already")
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at, whoever gives up first
        self._waiting[client_id] = future
        try:
            await self.link.publish(request_topic(self._identity.name, model), body, qos=1)
            await asyncio.wait({future}, timeout=timeout_s)
            if not future.done():
                raise UnavailableError(f"no reply within {timeout_s:g} s")
            return _judged(future.result())
        finally:
            del self._waiting[client_id]

    def _on_message(self, name: str, payload: bytes) -> None:
        try:
            reply = json.loads(payload)
            client_id = reply.get("id", "")
        except (ValueError, AttributeError, RecursionError):
            log.warning(event("reply_ignored", bytes=len(payload)))
            return
        waiting = self._waiting.get(client_id) if isinstance(client_id, str) else None
        if waiting is not None and not waiting.done():  # others use this device's topic, too
            waiting.set_result(reply)

    def _on_up(self) -> None:
        log.info(event("link_up", broker=f"{self._identity.broker_host}:{self._identity.broker_port}"))

    def _on_down(self, reason: str) -> None:
        # Whoever waits asks again rather than to wait for a reply that went to a session that is over.
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(UnavailableError(f"the link broke: {reason}"))
        log.warning(event("link_down", reason=reason))


def _judged(reply: dict[str, Any]) -> dict[str, Any]:
    error = reply.get("error")
    if error is None:
        if not isinstance(reply.get("outputs"), list) or not isinstance(reply.get("parameters"), dict):
            raise MessageError("the gateway's reply has neither outputs nor an error")
        return reply
    status, text = reply.get("status"), " ".join(str(error).split())[:300]
    if status in PASSING:
        raise UnavailableError(f"{text} ({status})")
    if status in (401, 403):
        raise RefusedError(f"{text} ({status})")
    raise InputError(f"{text} ({status})")
