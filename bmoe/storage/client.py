"""What a validator fetches from the gateway over mutual TLS: releases, blobs and kept evidence, each under a cap.

Nothing fetched is believed: blobs are checked against their digest here, everything else by whoever asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import ssl
from collections import deque
from pathlib import Path
from urllib.parse import urlsplit

from bmoe.protocol.errors import ConfigError, InputError, RefusedError, UnavailableError
from bmoe.protocol.files import write_durably
from bmoe.protocol.text import plain

TIMEOUT_S = 10.0
ERROR_BYTES = 4096
EVIDENCE_BYTES = 64 * 1024 * 1024


class GatewayClient:
    """HTTPS to one gateway with a client certificate; calls run in threads, one of them on a connection kept open."""

    def __init__(self, url: str, ca: Path, certificate: Path, key: Path, timeout_s: float = TIMEOUT_S) -> None:
        """Raises ConfigError for a URL that is not https://host:port or TLS files that cannot be used."""
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(f"the gateway's URL must be https://host:port, got {url!r}")
        self._host, self._port, self._timeout_s = parts.hostname, parts.port or 443, timeout_s
        try:
            self._tls = ssl.create_default_context(cafile=str(ca))
            self._tls.load_cert_chain(str(certificate), str(key))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"gateway TLS files {ca}, {certificate}, {key}: {error}") from error
        self._kept: deque[http.client.HTTPSConnection] = deque(maxlen=1)

    async def evidence(self, task: bytes) -> bytes:
        """The kept input message of a task: a sealed Task header, salt and input tensors."""
        return await asyncio.to_thread(self.get, f"/v1/evidence/{task.hex()}", EVIDENCE_BYTES)

    async def attachment(self, digest: bytes, size_max: int) -> bytes:
        """An attachment too large for its frame, kept as evidence; raises InputError when it is not that of the digest."""
        return await self._hashed("/v1/evidence", digest, size_max)

    async def blob(self, digest: bytes, size_max: int) -> bytes:
        """The bytes of this SHA-256; raises InputError when the gateway gives others."""
        return await self._hashed("/v1/blobs", digest, size_max)

    async def _hashed(self, folder: str, digest: bytes, size_max: int) -> bytes:
        data = await asyncio.to_thread(self.get, f"{folder}/{digest.hex()}", size_max)
        found = await asyncio.to_thread(lambda: hashlib.sha256(data).digest())
        if found != digest:
            raise InputError(f"the gateway's {folder}/{digest.hex()[:16]} has SHA-256 {found.hex()[:16]}")
        return data

    async def blob_file(self, digest: bytes, size: int, folder: Path) -> Path:
        """The blob as a durable file named by its digest; fetched only when the file is not there yet."""
        path = folder / digest.hex()
        if not path.is_file():
            data = await self.blob(digest, size)
            try:
                await asyncio.to_thread(write_durably, path, data)
            except OSError as error:
                raise UnavailableError(f"{path}: {error.strerror or error}") from error
        return path

    def get(self, path: str, size_max: int) -> bytes:
        """The body of a GET; raises UnavailableError (absent, down), RefusedError (403) or InputError (too large)."""
        try:
            connection, response = self._ask(path)
        except (OSError, http.client.HTTPException) as error:
            raise self._unavailable(path, error) from error
        try:
            body = response.read(size_max + 1 if response.status == 200 else ERROR_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._unavailable(path, error) from error
        finally:
            if response.isclosed() and not self._kept:  # read to its end: a handshake costs more than all else here
                self._kept.append(connection)
            else:
                connection.close()
        if response.status != 200:
            raise _refusal(response.status, body, path)
        if len(body) > size_max:
            raise InputError(f"gateway {path} gives more than the {size_max} bytes expected")
        return body

    def _ask(self, path: str) -> tuple[http.client.HTTPSConnection, http.client.HTTPResponse]:
        """Send a GET on the connection kept, and on a new one where that has been closed meanwhile."""
        with contextlib.suppress(IndexError):
            kept = self._kept.popleft()
            try:
                kept.request("GET", path)
                return kept, kept.getresponse()
            except (OSError, http.client.HTTPException):
                kept.close()
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._tls)
        try:
            connection.request("GET", path)
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException):
            connection.close()
            raise

    def _unavailable(self, path: str, error: Exception) -> UnavailableError:
        return UnavailableError(f"gateway {self._host}:{self._port}{path}: {error or type(error).__name__}")


def _refusal(status: int, body: bytes, path: str) -> Exception:
    try:
        said = plain(str(json.loads(body)["error"]), 300)
    except (ValueError, LookupError, TypeError, RecursionError):
        said = f"status {status}"
    error = RefusedError if status in (401, 403) else UnavailableError
    return error(f"gateway {path}: {said}")
