"""uvicorn inside our event loop: an address bound before anything starts, a door with limits, signals left to the process."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn

from bmoe.protocol.errors import ConfigError
from coordinator.door import Doorkeeper, Guest, Place

STOP_S = 3
BACKLOG = 512
# Files that a process of ours opens beside its connections: databases, logs, pipes to its workers.
OTHER_FILES = 256


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start without sockets of uvicorn's own: connections come from our door."""
        self.servers = []
        self.started = True
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process that we serve in."""
        yield


@contextlib.asynccontextmanager
async def serving(
    app: Any,
    host: str,
    port: int,
    *,
    connections: int,
    each: int,
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """Serve `app` until the block is left; gives the port. Raises ConfigError where the address cannot be bound.

    At most `connections` are held at once, `each` of one address; see coordinator/door.py.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    listener.setblocking(False)
    keeper = Doorkeeper(_files_for(connections), each)
    config = uvicorn.Config(
        app, http=Guest, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=STOP_S,
        proxy_headers=False,  # or callers from loopback could name any address as theirs
    )  # fmt: skip
    config.load()
    server = _Server(config)

    def guest(place: Place) -> Guest:
        return Guest(keeper, place, config=config, server_state=server.server_state, app_state={})

    running = asyncio.create_task(server.serve([listener]), name=f"http-{port}")
    ready = asyncio.create_task(server.ready.wait())
    keeping = {asyncio.create_task(keeper.watch()), asyncio.create_task(keeper.accept(listener, context, guest))}
    try:
        await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
            raise ConfigError(f"the HTTP server on {host} port {port} ended at once")
        yield int(listener.getsockname()[1])
    finally:
        ready.cancel()
        for task in keeping:
            task.cancel()
        server.should_exit = True
        keeper.close()
        await asyncio.gather(running, return_exceptions=True)
        listener.close()


def _files_for(connections: int) -> int:
    """How many connections the limit of open files allows, once it is raised as far as may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(16, min(connections, soft - OTHER_FILES))
    return connections
