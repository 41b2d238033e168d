"""The registrar's own connections to the broker: one answers the callout, one, of the system account, ends sessions."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import nats
from nats.aio.client import Client
from nats.errors import Error as NatsError

from bmoe.protocol.errors import UnavailableError
from coordinator.identity.infrastructure import Identity

CONNECT_S = 15.0


@contextlib.asynccontextmanager
async def connected(
    identity: Identity,
    host: str,
    port: int,
    user: str,
    report: Callable[..., Any],
    on_reconnected: Callable[[], None] = lambda: None,
) -> AsyncIterator[Client]:
    """A connection as `user` ("callout" or "system"), renewed for ever; UnavailableError if there is none in 15 s."""

    told = ""

    async def failed(error: Exception) -> None:
        nonlocal told
        reason = str(error) or type(error).__name__
        if reason != told:  # the same fault returns five times a second for as long as the broker is away
            told = reason
            report("broker_connection_failed", user=user, reason=reason)

    async def reconnected() -> None:
        nonlocal told
        told = ""
        report("broker_connection_renewed", user=user)
        on_reconnected()

    files = identity.tls("registrar")
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.cert, files.key)
    try:
        async with asyncio.timeout(CONNECT_S):
            client = await nats.connect(
                f"tls://{host}:{port}",
                name=f"registrar-{user}",
                tls=context,
                tls_handshake_first=True,
                nkeys_seed=str(identity.broker_keys.seed(user)),
                error_cb=failed,
                reconnected_cb=reconnected,
                # Soon: what connects to a new broker before us waits for the callout until its authorization time-out.
                reconnect_time_wait=0.05,
                max_reconnect_attempts=-1,
                ping_interval=20,
            )
    except (NatsError, OSError) as error:  # TimeoutError and ssl.SSLError are OSErrors
        raise UnavailableError(f"broker at {host}:{port}: {error or type(error).__name__}") from error
    try:
        yield client
    finally:
        with contextlib.suppress(NatsError, OSError):
            await client.close()
