"""The coordinator's end of the bridge: jobs go out to the ServerApp over a Unix socket, replies come back.

More than one bridge may call, for a run of an earlier SuperLink ends late: the first is used, the others wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog

from bmoe.protocol.errors import UnavailableError
from coordinator.flower.layout import FlowerLayout

log = structlog.get_logger("flower")
LINE_MAX = 1 << 20


class Post:
    """`start`, then `push` jobs. `nodes` are the ids that are online; `connected` says whether a bridge is there."""

    def __init__(self, layout: FlowerLayout) -> None:
        self._layout = layout
        self._bridges: deque[asyncio.StreamWriter] = deque()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = itertools.count(1)
        self._server: asyncio.Server | None = None
        self.nodes: frozenset[int] = frozenset()
        self.on_nodes: Callable[[], None] = lambda: None

    @property
    def connected(self) -> bool:
        """Whether a bridge is there."""
        return bool(self._bridges)

    async def start(self) -> None:
        """Listen for the bridge."""
        folder = self._layout.folder
        # Through the folder's descriptor: a Unix socket's path is short, and a state directory's may be long.
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._layout.socket.unlink(missing_ok=True)
            place = f"/proc/self/fd/{handle}/{self._layout.socket.name}"
            self._server = await asyncio.start_unix_server(self._called, place, limit=LINE_MAX)
            self._layout.socket.chmod(0o600)
        finally:
            os.close(handle)

    async def push(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Have one message pushed to one node; its reply. Raises UnavailableError where none comes."""
        if not self._bridges:
            raise UnavailableError("Flower's ServerApp is not there yet")
        number = next(self._ids)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._bridges[0].write(json.dumps({**job, "id": number}).encode() + b"\n")
            return await asyncio.wait_for(waiting, timeout_s)
        except asyncio.TimeoutError:
            raise UnavailableError(f"no reply over Flower within {timeout_s:g} s") from None
        finally:
            del self._waiting[number]

    async def stop(self) -> None:
        """Hang up."""
        if self._server is not None:
            self._server.close()
        for bridge in self._bridges:
            bridge.close()

    async def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._bridges.append(writer)
        log.info("bridge_connected", bridges=len(self._bridges))
        try:
            async for line in reader:
                self._hear(json.loads(line), writer is self._bridges[0])
        except (OSError, ValueError) as error:
            log.warning("bridge_failed", error=str(error))
        finally:
            first = self._bridges[0] is writer
            self._bridges.remove(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            if first:
                self._lost()

    def _hear(self, values: dict[str, Any], first: bool) -> None:
        if "nodes" in values:
            if first:
                self.nodes = frozenset(values["nodes"])
                self.on_nodes()
            return
        waiting = self._waiting.get(values.get("id", 0))
        if waiting is None or waiting.done():
            return
        if "error" in values:
            waiting.set_exception(UnavailableError(str(values["error"])[:300]))
        else:
            waiting.set_result(dict(values["reply"]))

    def _lost(self) -> None:
        self.nodes = frozenset()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(UnavailableError("Flower's ServerApp has gone"))
        log.warning("bridge_lost")
