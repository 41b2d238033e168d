"""Starting and ending a peer: its server in its own environment, and the client that asks it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench.measure import Asker, asking, worker_of
from benchmarks.processes import ROOT, Running, end_family, spawn, tail
from bmoe.protocol.errors import UnavailableError

HERE = Path(__file__).parent
READY_WITHIN_S = 90.0
PATIENCE_S = 8.0
LOOK_S = 0.1


@dataclass(frozen=True)
class Peer:
    """A peer: how its requests are spelled, where they go, and which package names its version."""

    name: str
    package: str
    encoding: str
    path: str

    @property
    def environment(self) -> Path:
        """Its virtual environment."""
        return ROOT / f".venv-{self.name}"

    @property
    def why_not(self) -> str:
        """Why it cannot take part; empty when it can."""
        if (self.environment / ".ready").exists():
            return ""
        try:
            lines = (self.environment / ".why").read_text(errors="replace").strip().splitlines()
        except OSError:
            return "not installed: run `make bench-peers`"
        return f"does not install: {lines[-1] if lines else 'pip gave no reason'}"


# KServe answers JSON faster than its binary form here, so it is asked in JSON; Ray Serve has no protocol of its own.
PEERS = (
    Peer("hivemind", "hivemind", "", ""),
    Peer("kserve", "kserve", "json", "/v2/models/expert/infer"),
    Peer("ray", "ray", "raw", "/"),
)


@contextlib.asynccontextmanager
async def serving(peer: Peer, model: Path, windows: Path, folder: Path) -> AsyncIterator[tuple[Running, Asker, str]]:
    """The peer's server, its client, and the server's URL ("" where it has none); all of it ends with the block."""
    folder.mkdir()
    python, ready = str(peer.environment / "bin" / "python"), folder / "ready.json"
    argv = [python, str(HERE / f"{peer.name}_server.py"), str(model), str(ready)]
    argv += {"kserve": [str(_free_port())], "ray": [str(_free_port()), str(folder / "ray")]}.get(peer.name, [])
    server = await spawn(peer.name, argv, folder / "server.log")
    try:
        said = await _ready(server, ready)
        if "url" in said:
            client: tuple[str, ...] = worker_of(model.parent)
        else:
            client = (python, str(HERE / f"{peer.name}_client.py"), str(model), str(windows), str(ready))
        async with asking(folder / "client.log", client) as asker:
            yield server, asker, said.get("url", "")
    finally:
        await end_family(server, PATIENCE_S)


async def _ready(server: Running, ready: Path) -> dict[str, Any]:
    deadline = time.monotonic() + READY_WITHIN_S
    while not ready.exists():
        if not server.alive or time.monotonic() > deadline:
            state = "is not ready" if server.alive else f"ended with status {server.process.returncode}"
            raise UnavailableError(f"{server.name} {state}\n{tail(server.log)}")
        await asyncio.sleep(LOOK_S)
    found: dict[str, Any] = json.loads(ready.read_bytes())
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
