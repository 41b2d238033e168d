"""Requests over MQTT: a device publishes one on its own topic and gets the answer on its reply topic.

The broker lets each device publish under its own name alone, so the topic says who asks. What follows is the entrance
that HTTP uses too. Each device has a queue of its own: one that floods the gateway waits for itself alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import orjson
import structlog

from bmoe.protocol.errors import BmoeError, MessageError, RefusedError, UnavailableError
from bmoe.protocol.topics import topic
from coordinator.bodies import Bodies
from coordinator.intake import LARGE_BYTES, check_lists
from coordinator.mqtt_history import reply_to
from coordinator.recent import Recent, request_key

log = structlog.get_logger("mqtt_requests")

DEVICE_WAITING = 32
DEVICE_BYTES = 16 << 20
DEVICE_RUNNING = 8
REPLY_S = 60.0
STOP_S = 3.0
ID_CHARACTERS = 128
# A body larger than this is not parsed only to echo its id in a refusal.
PEEK_BYTES = 4096

REFUSALS_SENT = 8
RETRY_S = 0.05
T = TypeVar("T")
Answer = Callable[[str, str, bytes, str], Awaitable[tuple[bytes, str]]]


class Aside(Protocol):
    """Does work on large JSON off the loop."""

    async def __call__(self, work: Callable[[], T]) -> T: ...


class Replies(Protocol):
    """What replying needs of the link."""

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> asyncio.Future[None]:
        """Publish a message, and tell when the broker has it."""
        ...

    async def wait_up(self, timeout_s: float) -> None:
        """Return once the link is up; raises UnavailableError."""
        ...


class Earlier(Protocol):
    """What is known of requests from before this run, and who wants to know that a reply was sent."""

    async def earlier(self, tenant: str, client_id: str, where: str) -> tuple[bool, bytes | None]:
        """(True, reply, or None while it is in work) if an earlier run took this on; (False, None) otherwise."""
        ...

    def sent(self, request: str) -> None:
        """The broker has the reply to this request."""
        ...


@dataclass
class _Queue:
    """One device's requests: whose they are, those that wait, how many are in work, the bytes of both, and refusals
    on their way."""

    tenant: str
    waiting: deque[tuple[str, bytes]] = field(default_factory=deque)
    running: int = 0
    bytes: int = 0
    refusals: int = 0
    told: bool = False


class MqttRequests:
    """Takes what devices publish; nothing of it blocks the link, nothing of it grows without bound.

    `answer(device, model, body, where)` gives the reply of the HTTP API and the request's own id or raises BmoeError,
    `where` being the name by which a later run knows the request; `status(error)` is its HTTP status; `owner(device)`
    the tenant, in whose name `bodies` counts what waits and is in work.
    """

    def __init__(
        self,
        answer: Answer,
        link: Replies,
        status: Callable[[BmoeError], int],
        owner: Callable[[str], str],
        history: Earlier,
        bodies: Bodies,
        aside: Aside,
    ) -> None:
        self._answer, self._link, self._status = answer, link, status
        self._owner, self._history = owner, history
        self._bodies, self._aside = bodies, aside
        self._queues: dict[str, _Queue] = {}
        self._recent = Recent()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    def take(self, device: str, model: str, payload: bytes) -> None:
        """A request as it came from the broker."""
        queue = self._queues.get(device)
        if queue is None:
            queue = self._queues[device] = _Queue(self._tenant(device))
        full = len(queue.waiting) + queue.running >= DEVICE_WAITING
        full = full or (queue.bytes + len(payload) > DEVICE_BYTES and queue.bytes > 0)
        if full or self._stopping:
            self._refuse(device, queue, payload)
            return
        try:
            self._bodies.add(queue.tenant, len(payload))
        except UnavailableError as error:
            self._refuse(device, queue, payload, error)
            return
        queue.waiting.append((model, payload))
        queue.bytes += len(payload)
        self._start(device, queue)

    async def stop(self) -> None:
        """Take nothing more, and let what is in work end within bounds."""
        self._stopping = True
        for queue in self._queues.values():
            queue.waiting.clear()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, device: str, queue: _Queue) -> None:
        while queue.waiting and queue.running < DEVICE_RUNNING:
            model, payload = queue.waiting.popleft()
            queue.running += 1
            self._spawn(self._in_turn(device, queue, model, payload))

    async def _in_turn(self, device: str, queue: _Queue, model: str, payload: bytes) -> None:
        try:
            await self._serve(device, model, payload)
        finally:
            queue.running -= 1
            queue.bytes -= len(payload)
            self._bodies.remove(queue.tenant, len(payload))
            self._start(device, queue)
            if not queue.running:
                self._queues.pop(device, None)

    def tell(self, outcome: Awaitable[tuple[str, bytes, str]]) -> None:
        """Send the outcome of a request that an earlier run left: its device, the reply, and the request's own id."""
        self._spawn(self._tell(outcome))

    async def _tell(self, outcome: Awaitable[tuple[str, bytes, str]]) -> None:
        device, reply, request = await outcome
        await self._deliver(device, reply, request=request)

    async def _serve(self, device: str, model: str, payload: bytes) -> None:
        """One request, from its bytes to the broker's acknowledgement of its reply."""
        key, client_id, request = b"", "", ""
        try:
            client_id, key = await self._named(model, payload)
            where = reply_to(device, key)
            fresh, reply = await self._begin(device, client_id, key, where)
            if not fresh:
                log.info("request_repeated", device=device, id=client_id, in_work=reply is None)
                if reply is not None:
                    await self._deliver(device, reply)
                return
            reply, request = await self._answer(device, model, payload, where)
        except BmoeError as error:
            reply = self._error(error, client_id)
            self._forget(device, key)
        except Exception:
            log.exception("request_failed", device=device, model=model)
            reply = self._error(BmoeError("internal error; the gateway's log has the details"), client_id)
            self._forget(device, key)
        else:
            if key:
                self._recent.done(device, key, reply)
        await self._deliver(device, reply, client_id, request)

    async def _named(self, model: str, payload: bytes) -> tuple[str, bytes]:
        """The client's id, and what makes another message the same request; both empty where it has no id."""

        def named() -> tuple[str, bytes]:
            client_id = id_of(payload)
            return client_id, request_key(client_id, model, payload) if client_id else b""

        return await self._aside(named) if len(payload) > LARGE_BYTES else named()

    def _tenant(self, device: str) -> str:
        try:
            return self._owner(device)
        except RefusedError:  # a stranger, who is told so in his turn
            return device

    async def _begin(self, device: str, client_id: str, key: bytes, where: str) -> tuple[bool, bytes | None]:
        """(True, None) for a request to be run; else (False, its reply or None if it is in work)."""
        if not key:
            return True, None
        fresh, reply = self._recent.begin(device, key, time.monotonic())
        if not fresh:
            return False, reply
        known, reply = await self._history.earlier(self._owner(device), client_id, where)
        if known and reply is not None:
            self._recent.done(device, key, reply)
        elif known:  # an earlier run's, which is told when it is finished; asked for again, the journal is asked again
            self._forget(device, key)
        return not known, reply

    def _forget(self, device: str, key: bytes) -> None:
        if key:  # an error may pass: the same request again is another attempt
            self._recent.forget(device, key)

    async def _deliver(self, device: str, reply: bytes, client_id: str = "", request: str = "") -> None:
        """Publish a reply, again after each break of the link, for REPLY_S; note that of `request` as sent."""
        deadline = time.monotonic() + REPLY_S
        while True:
            try:
                await self._link.publish(topic(device, "reply"), reply, qos=1)
                if request:
                    self._history.sent(request)
                return
            except MessageError as error:
                reply = self._error(MessageError(f"the answer cannot be sent: {error}; ask for fewer rows"), client_id)
            except UnavailableError as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    log.warning("reply_not_sent", device=device, id=client_id, reason=str(error))
                    return
                with contextlib.suppress(UnavailableError):
                    await self._link.wait_up(left)
                await asyncio.sleep(RETRY_S)  # a link that is up and takes nothing must not be tried in a rush

    def _refuse(self, device: str, queue: _Queue, payload: bytes, error: BmoeError | None = None) -> None:
        held = len(queue.waiting) + queue.running
        if not queue.told:  # once for each time that its queue fills
            queue.told = True
            log.warning("requests_refused", device=device, held=held, bytes=queue.bytes)
        if queue.refusals < REFUSALS_SENT:  # a flood of requests must not become a flood of refusals
            queue.refusals += 1
            limit = f"{held} requests of {device} with {queue.bytes} bytes are in work or wait, the limit: slow down"
            status = 503 if self._stopping or error else 429
            error = error or UnavailableError("the gateway is stopping" if self._stopping else limit)
            self._spawn(self._tell_refused(device, queue, payload, error, status))

    async def _tell_refused(self, device: str, queue: _Queue, payload: bytes, error: BmoeError, status: int) -> None:
        try:
            client_id = id_of(payload) if len(payload) <= PEEK_BYTES else ""
            refusal = self._error(error, client_id, status)
            await self._link.publish(topic(device, "reply"), refusal, qos=1)
        except (UnavailableError, MessageError):
            pass
        finally:
            queue.refusals -= 1

    def _error(self, error: BmoeError, client_id: str, status: int | None = None) -> bytes:
        values: dict[str, Any] = {"error": str(error), "status": status or self._status(error)}
        return orjson.dumps({"id": client_id, **values} if client_id else values)

    def _spawn(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("background_task_failed", error=repr(task.exception()))


def id_of(payload: bytes) -> str:
    """The `id` of a request's body, empty if it has none; raises MessageError for an id or a body that is none.

    The body is parsed for it only where it can have one.
    """
    if b'"id"' not in payload:
        return ""
    check_lists(payload, len(payload))
    try:
        values = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise MessageError(f"the body is not JSON: {error}") from None
    found = values.get("id", "") if isinstance(values, dict) else ""
    if not isinstance(found, str) or len(found) > ID_CHARACTERS:
        raise MessageError(f"id must be text of at most {ID_CHARACTERS} characters")
    return found


def owner_of(members: dict[str, Any], device: str) -> str:
    """Whose device it is, by its enrolment: the tenant of its requests. Raises RefusedError for a stranger."""
    member = members.get(device)
    if member is None or member.role != "agent":
        raise RefusedError(f"{device} is not enrolled as a device on this ledger")
    return str(member.owner)
