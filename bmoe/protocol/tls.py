"""A client's TLS: the gateway's own authority and no other, for MQTT and HTTPS alike."""

from __future__ import annotations

import ssl
from pathlib import Path

from bmoe.protocol.errors import ConfigError


def mutual_tls(ca: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """A client's TLS context, version 1.2 or later, that trusts `ca` alone and checks the server's name.

    Raises ConfigError when a PEM file is missing, damaged or does not fit the others.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    path: Path | None = ca
    try:
        context.load_verify_locations(ca)
        if certificate is not None:
            path = certificate
            # Without a password given, an encrypted key would ask for one on the terminal.
            context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"TLS files {path}, {key or 'no key'} cannot be used: {error}") from None
    return context
