"""Which broker the fleet tests run on: NATS, or Mosquitto with BMOE_TEST_BROKER=mosquitto (`make test-mosquitto`)."""

from __future__ import annotations

import pytest

from benchmarks.mosquitto import chosen

NATS = chosen() == "nats"
# What one whose certificate is revoked is told: NATS refuses the connection, Mosquitto already the TLS handshake.
REVOKED = "not authorised" if NATS else "certificate revoked"
# What one is told whom the registrar does not want: Mosquitto lets it in, and the registrar ends that session.
UNWANTED = "not authorised" if NATS else "connection lost"


def nats_only(why: str) -> pytest.MarkDecorator:
    """A test of what NATS alone does, and the reason."""
    return pytest.mark.skipif(not NATS, reason=f"of NATS: {why}")


def mosquitto_only(why: str) -> pytest.MarkDecorator:
    """A test of what Mosquitto alone does, and the reason."""
    return pytest.mark.skipif(NATS, reason=f"of Mosquitto: {why}")
