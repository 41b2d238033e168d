"""The coordinator's end of the bridge: jobs go out to the ServerApp over a Unix socket, replies come back.

Where the process beside the SuperLink was killed, its run goes on and another begins: the bridge that called last is
used, and the one before is told to end, or each such death would leave a run for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from typing import Any

import structlog

from bmoe.protocol.errors import UnavailableError
from coordinator.flower.layout import FlowerLayout

log = structlog.get_logger("flower")
LINE_MAX = 1 << 20
END = b'{"end": true}\n'


class Post:
    """`start`, then `push` jobs. `nodes` are the ids that are online; `connected` says whether a bridge is there."""

    def __init__(self, layout: FlowerLayout) -> None:
        self._layout = layout
        self._bridge: asyncio.StreamWriter | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = itertools.count(1)
        self._server: asyncio.Server | None = None
        self.nodes: frozenset[int] = frozenset()

    @property
    def connected(self) -> bool:
        """Whether a bridge is there."""
        return self._bridge is not None

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
        if self._bridge is None:
            raise UnavailableError("Flower's ServerApp is not there yet")
        number = next(self._ids)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._bridge.write(json.dumps({**job, "id": number}).encode() + b"\n")
            return await asyncio.wait_for(waiting, timeout_s)
        except asyncio.TimeoutError:
            raise UnavailableError(f"no reply over Flower within {timeout_s:g} s") from None
        finally:
            del self._waiting[number]

    async def stop(self) -> None:
        """Hang up."""
        if self._server is not None:
            self._server.close()
        if self._bridge is not None:
            self._bridge.close()

    async def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        before, self._bridge = self._bridge, writer
        log.info("bridge_connected", another=before is not None)
        if before is not None:
            self._lost()
            before.write(END)
            before.close()
        try:
            async for line in reader:
                if writer is self._bridge:
                    self._hear(json.loads(line))
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            log.warning("bridge_failed", error=str(error) or type(error).__name__)
        finally:
            writer.close()
            if self._bridge is writer:
                self._bridge = None
                self._lost()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _hear(self, values: dict[str, Any]) -> None:
        if "nodes" in values:
            self.nodes = frozenset(values["nodes"])
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
