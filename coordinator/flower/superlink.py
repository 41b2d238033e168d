"""The SuperLink as a child of `bmoe up`: on loopback, over TLS, for registered SuperNodes alone, with its own database.

Its control API asks for no credential, so its port is never reachable from elsewhere: SuperNodes come through `proxy`.
"""

from __future__ import annotations

import asyncio
import http.client
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.embedded.nats_server import TlsFiles
from coordinator.embedded.supervisor import Child
from coordinator.flower.layout import FlowerLayout, flower_program

READY_S = 120.0
LOOK_S = 0.5
# Together 0.3 GB and some seconds of CPU: what answers requests goes first.
NICE = 5


def superlink_child(layout: FlowerLayout, port: int, tls: TlsFiles, log: Path) -> Child:
    """The child; raises ConfigError where flwr is not installed."""
    program = flower_program("flower-superlink")

    async def ready() -> Mapping[str, Any] | None:
        while not await asyncio.to_thread(healthy, port, tls.ca):  # noqa: ASYNC110 (another process has no event)
            await asyncio.sleep(LOOK_S)
        return {"port": port}

    argv = (
        sys.executable, "-m", "coordinator.embedded.nice", str(NICE), program,
        "--host", "127.0.0.1", "--port", str(port), "--database", str(layout.database.resolve()),
        "--ssl-certfile", str(tls.cert.resolve()), "--ssl-keyfile", str(tls.key.resolve()),
        "--ssl-ca-certfile", str(tls.ca.resolve()), "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    return Child("superlink", argv, log, env=layout.environment(), ready=ready, ready_within=READY_S)


def healthy(port: int, ca: Path) -> bool:
    """Whether a SuperLink answers on loopback."""
    context = ssl.create_default_context(cafile=str(ca))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
