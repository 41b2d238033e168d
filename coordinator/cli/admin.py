"""An operator's connection to the registrar: HTTPS with the certificate bmoe-admin of the state directory."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from typing import Any

from bmoe.protocol.errors import ConfigError, InputError, RefusedError, UnavailableError
from coordinator.embedded.ports import read_ports
from coordinator.state_layout import StateLayout

ADMIN = "bmoe-admin"
TIMEOUT_S = 120.0
REPLY_BYTES = 40 << 20  # drafts of metadata, as text in JSON


class Admin:
    """Calls of the registrar's /v1/admin paths."""

    def __init__(self, state: Path) -> None:
        layout = StateLayout(state)
        self._host, self._port = layout.dial("host"), read_ports(state).get("fleet")
        if self._port is None:
            raise ConfigError(f"{state} knows of no fleet port: bring the gateway up first (bmoe up)")
        try:
            self._tls = ssl.create_default_context(cafile=str(layout.ca))
            self._tls.load_cert_chain(str(layout.certificate(ADMIN)), str(layout.key(ADMIN)))
        except OSError as error:
            raise ConfigError(f"the operator's certificate under {layout.identity} cannot be used: {error}") from error

    def call(self, method: str, path: str, body: dict[str, Any] | bytes | None = None) -> dict[str, Any]:
        """One call; raises InputError, RefusedError or UnavailableError with the registrar's own words."""
        connection = http.client.HTTPSConnection(self._host, self._port, context=self._tls, timeout=TIMEOUT_S)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            response = connection.getresponse()
            reply = json.loads(response.read(REPLY_BYTES))
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise UnavailableError(f"the registrar on port {self._port} does not answer: {error}") from error
        finally:
            connection.close()
        if not isinstance(reply, dict):
            raise UnavailableError(f"the registrar on port {self._port} answers with no JSON object")
        if response.status == 200:
            return reply
        message = str(reply.get("error", f"HTTP {response.status}"))
        kind = RefusedError if response.status == 403 else InputError if response.status < 500 else UnavailableError
        raise kind(message)
