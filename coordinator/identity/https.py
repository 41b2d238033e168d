"""uvicorn inside our event loop, over TLS with an optional client certificate that the application gets to see."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bmoe.protocol.errors import ConfigError
from coordinator.embedded.nats_server import TlsFiles

CONNECTIONS_MAX = 256
REQUEST_S = 15.0  # from the connection to its first complete request head
STOP_S = 3


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


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are the process's business


@contextlib.asynccontextmanager
async def serving(app: Any, host: str, port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Serve `app` until the block is left; gives the port. Raises ConfigError where the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    config = uvicorn.Config(
        app, http=PeerProtocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        limit_concurrency=CONNECTIONS_MAX, timeout_keep_alive=5, timeout_graceful_shutdown=STOP_S,
        proxy_headers=False,  # or callers from loopback could name any address as theirs
    )  # fmt: skip
    config.load()
    config.ssl = context
    server = _Server(config)
    running = asyncio.create_task(server.serve([listener]), name="fleet-https")
    ready = asyncio.create_task(server.ready.wait())
    try:
        await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
            raise ConfigError(f"the HTTPS server on {host} port {port} ended at once")
        yield int(listener.getsockname()[1])
    finally:
        ready.cancel()
        server.should_exit = True
        await asyncio.gather(running, return_exceptions=True)
        listener.close()
