"""The fleet server's TLS: a client certificate is optional, and the application gets to see it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from bmoe.protocol.errors import ConfigError
from coordinator.embedded.nats_server import TlsFiles
from coordinator.serving import serving

CONNECTIONS_MAX = 256
REQUEST_S = 15.0  # from the connection to its first complete request head


def server_tls(files: TlsFiles) -> ssl.SSLContext:
    """TLS 1.2 or later; a client without certificate is let in, one with a certificate of another CA is not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL
    try:
        context.load_cert_chain(files.cert, files.key)
        context.load_verify_locations(files.ca)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"TLS files {files.cert}, {files.key}, {files.ca} cannot be used: {error}") from error
    return context


class PeerProtocol(H11Protocol):
    """Puts the peer's certificate (DER, verified by TLS, or None) into the request's state, and ends idle callers."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        self.app_state = {**self.app_state, "peer": tls.getpeercert(binary_form=True) if tls else None}
        self._patience = self.loop.call_later(REQUEST_S, self._out_of_patience)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def _out_of_patience(self) -> None:
        # uvicorn bounds the pause between requests, not the time to send the first one.
        if self.cycle is None:
            self.transport.abort()


@contextlib.asynccontextmanager
async def fleet_serving(app: Any, host: str, port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Serve `app` over TLS until the block is left, each request knowing its peer's certificate; gives the port."""
    limit = CONNECTIONS_MAX
    async with serving(app, host, port, connections_max=limit, context=context, protocol=PeerProtocol) as bound:
        yield bound
