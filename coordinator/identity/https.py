"""The fleet server's TLS: a client certificate is optional, and the application gets to see it (see coordinator/door.py)."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

from bmoe.protocol.errors import ConfigError
from coordinator.embedded.nats_server import TlsFiles
from coordinator.serving import serving

CONNECTIONS_MAX = 512
CONNECTIONS_EACH = 128


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


@contextlib.asynccontextmanager
async def fleet_serving(app: Any, host: str, port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Serve `app` over TLS until the block is left, each request knowing its peer's certificate; gives the port."""
    limits = {"connections": CONNECTIONS_MAX, "each": CONNECTIONS_EACH}
    async with serving(app, host, port, context=context, **limits) as bound:
        yield bound
