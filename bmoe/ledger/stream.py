"""The ledger engine: one NATS JetStream stream, appended to by authors and followed by replicas.

The engine orders and replicates; it is not believed. A publish returns when the engine has acknowledged it, and with
`sync_interval: always` that means it is on disk.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError, NotFoundError

from bmoe.protocol.errors import LedgerError, LedgerForkError, UnavailableError

STREAM = "LEDGER"
CHECKPOINTS = "CHECKPOINTS"
FRAMES = "ledger.frame"
CONNECT_S = 15.0
ACK_TIMEOUT_S = 2.0
PULL_BATCH = 512
PULL_EXPIRES_S = 20.0
# An engine that dies takes our consumer along and says nothing: a pull that hears neither message nor heartbeat is over.
HEARTBEAT_S = 1.0
SILENCE_S = 2.5
CONSUMER_IDLE_S = 60.0
TURN_EVERY = 32


@dataclass(frozen=True)
class LedgerAccess:
    """Where the ledger engine listens and with which certificate to come."""

    host: str
    port: int
    ca: Path
    certificate: Path
    key: Path

    def tls(self) -> ssl.SSLContext:
        """A client context that trusts the gateway's CA alone."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(str(self.certificate), str(self.key))
        return context


@dataclass(frozen=True)
class StreamMessage:
    """One message as the engine keeps it: its position (1, 2, ...) and its bytes."""

    position: int
    data: bytes


class LedgerStream:
    """A connection to the engine; reconnects by itself for ever."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._js = client.jetstream(timeout=ACK_TIMEOUT_S)

    @classmethod
    async def connect(cls, access: LedgerAccess, name: str) -> LedgerStream:
        """Connect within 15 s, or raise UnavailableError."""
        try:
            client = await asyncio.wait_for(_dial(access, name), CONNECT_S)
        except (NatsError, OSError, asyncio.TimeoutError, ssl.SSLError) as error:
            raise UnavailableError(
                f"ledger engine at {access.host}:{access.port}: {error or type(error).__name__}"
            ) from error
        return cls(client)

    async def append(self, author: str, data: bytes, message_id: str, expected_last: int) -> int:
        """Append a frame after the author's frame at position `expected_last` (0: none); the position it got.

        Durable when this returns. Repeating the same message id is safe: the engine answers with the first position.
        Raises LedgerError when another frame of this author came between, UnavailableError when the engine is away.
        """
        headers = {"Nats-Msg-Id": message_id, "Nats-Expected-Last-Subject-Sequence": str(expected_last)}
        try:
            ack = await self._js.publish(frame_subject(author), data, headers=headers, timeout=ACK_TIMEOUT_S)
        except APIError as error:
            if error.err_code == 10071:
                raise LedgerError(f"another frame of {author} came in between: {error.description}") from error
            raise UnavailableError(f"ledger engine refused the frame: {error.description}") from error
        except (NatsError, OSError, asyncio.TimeoutError) as error:
            raise UnavailableError(f"ledger engine did not acknowledge: {error or type(error).__name__}") from error
        return ack.seq

    async def last_of(self, author: str) -> StreamMessage | None:
        """The author's last frame, or None."""
        try:
            message = await self._js.get_last_msg(STREAM, frame_subject(author))
        except NotFoundError:
            return None
        except (NatsError, OSError, asyncio.TimeoutError) as error:
            raise UnavailableError(f"ledger engine: {error or type(error).__name__}") from error
        return StreamMessage(message.seq or 0, message.data or b"")

    async def height(self) -> int:
        """The position of the last message."""
        try:
            return (await self._js.stream_info(STREAM)).state.last_seq
        except (NatsError, OSError, asyncio.TimeoutError) as error:
            raise UnavailableError(f"ledger engine: {error or type(error).__name__}") from error

    async def follow(self, after: int) -> AsyncIterator[StreamMessage]:
        """Every message behind position `after`, in order, for ever; raises LedgerForkError at a gap.

        A position that the engine skips is lost or damaged content: that halts a replica, it is never passed over.
        """
        expected = after + 1
        while True:
            try:
                async for message in self._from(expected):
                    if message.position != expected:
                        raise LedgerForkError(
                            f"ledger position {expected} is missing: the engine went on at {message.position}"
                        )
                    expected += 1
                    yield message
                    if expected % TURN_EVERY == 0:
                        await asyncio.sleep(0)
            except (NatsError, OSError, asyncio.TimeoutError, UnavailableError):
                await asyncio.sleep(0.2)

    async def _from(self, start: int) -> AsyncIterator[StreamMessage]:
        """Messages from position `start` through an ephemeral pull consumer, asked for in large batches."""
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=start,
            ack_policy=AckPolicy.NONE,
            filter_subject=f"{FRAMES}.>",
            inactive_threshold=CONSUMER_IDLE_S,
            mem_storage=True,
        )
        consumer = (await self._js.add_consumer(STREAM, config)).name
        inbox = self.client.new_inbox()
        arrived: asyncio.Queue[Msg] = asyncio.Queue()  # bounded by what we ask for at a time
        subscription = await self.client.subscribe(inbox, cb=arrived.put, pending_bytes_limit=256 * 1024 * 1024)
        pull = {"batch": PULL_BATCH, "expires": int(PULL_EXPIRES_S * 1e9), "idle_heartbeat": int(HEARTBEAT_S * 1e9)}
        request = json.dumps(pull).encode()
        try:
            while True:
                await self.client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{consumer}", request, reply=inbox)
                taken = 0
                while taken < PULL_BATCH:
                    message = await _next(arrived, SILENCE_S)
                    status = (message.headers or {}).get("Status")
                    if status == "100":
                        continue
                    if status == "408":
                        break
                    if status is not None:
                        raise UnavailableError(f"ledger engine: {status} {message.headers}")
                    taken += 1
                    yield StreamMessage(message.metadata.sequence.stream, message.data)
        finally:
            try:
                await subscription.unsubscribe()
            except (NatsError, OSError):
                pass

    async def close(self) -> None:
        """Drop the connection."""
        try:
            await self.client.close()
        except (NatsError, OSError):
            pass


def frame_subject(author: str) -> str:
    """Where an author's frames go; the engine lets each author publish below its own name alone."""
    return f"{FRAMES}.{author}.frame"


async def _next(arrived: asyncio.Queue[Msg], timeout_s: float) -> Msg:
    """The next message, without a turn of the event loop if it is here already: at a few turns a message (nats-py's own
    next_msg), the follower of a busy process falls ever further behind the frames that the process itself writes."""
    if not arrived.empty():
        return arrived.get_nowait()
    return await asyncio.wait_for(arrived.get(), timeout_s)


async def _dial(access: LedgerAccess, name: str) -> Client:
    return await nats.connect(
        f"tls://{access.host}:{access.port}",
        name=name,
        tls=access.tls(),
        tls_handshake_first=True,
        connect_timeout=3,
        reconnect_time_wait=0.2,
        max_reconnect_attempts=-1,
        allow_reconnect=True,
        error_cb=_quiet,
        pending_size=64 * 1024 * 1024,
    )


async def _quiet(_: Exception) -> None:
    """Connection errors surface at the calls that they break; nats-py would print them as well."""


def message_id(digest: bytes) -> str:
    """The engine's de-duplication id of a frame."""
    return digest.hex()
