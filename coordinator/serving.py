"""uvicorn inside our event loop: an address bound before anything starts, and signals left to the process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn

from bmoe.protocol.errors import ConfigError

STOP_S = 3


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
async def serving(
    app: Any,
    host: str,
    port: int,
    *,
    connections_max: int,
    context: ssl.SSLContext | None = None,
    protocol: type[asyncio.Protocol] | str = "httptools",
) -> AsyncIterator[int]:
    """Serve `app` until the block is left; gives the port. Raises ConfigError where the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        limit_concurrency=connections_max, timeout_keep_alive=30, timeout_graceful_shutdown=STOP_S,
        proxy_headers=False,  # or callers from loopback could name any address as theirs
    )  # fmt: skip
    config.load()
    config.ssl = context
    server = _Server(config)
    running = asyncio.create_task(server.serve([listener]), name=f"http-{port}")
    ready = asyncio.create_task(server.ready.wait())
    try:
        await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
            raise ConfigError(f"the HTTP server on {host} port {port} ended at once")
        yield int(listener.getsockname()[1])
    finally:
        ready.cancel()
        server.should_exit = True
        await asyncio.gather(running, return_exceptions=True)
        listener.close()
