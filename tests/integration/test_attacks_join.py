"""Getting into the fleet by the back door: spent tokens, others' names, and keys with which one could deny anything."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from fault_tools import until
from live_fleet import PATIENCE_S, LiveFleet

from benchmarks.processes import finish, program, spawn
from bmoe.protocol.envelope import Envelope
from bmoe.protocol.errors import RefusedError
from bmoe.protocol.join_token import parse_token
from bmoe.protocol.keys import key_id, verify_ed25519
from bmoe.protocol.messages import Enrolment
from bmoe.protocol.tls import mutual_tls
from coordinator.cli.admin import Admin
from edge_agent.fleet import FleetClient

pytestmark = pytest.mark.asyncio(loop_scope="session")

Join = Callable[..., Awaitable[tuple[int, str]]]


@pytest.fixture
def join(fleet: LiveFleet, tmp_path: Path) -> Join:
    """`bmoe-agent join` as a process, each time a new device: its exit status and its last words."""

    async def run(token: str, name: str) -> tuple[int, str]:
        log, state = tmp_path / f"{name}.log", tmp_path / f"{name}-{time.monotonic_ns()}"
        argv = (program("bmoe-agent"), "join", token, "--state", str(state), "--name", name)
        status = await finish(await spawn(f"{name} join", argv, log), PATIENCE_S)
        assert (state / "identity" / "identity.json").exists() == (status == 0)
        return status, log.read_text()

    return run


async def refused(fleet: LiveFleet, name: str, reason: str) -> None:
    """The registrar has named the refusal, and no such device has come onto the ledger."""
    line = await fleet.logged("registrar", "enrolment_refused", device=name, reason=reason)
    assert line["address"] == "127.0.0.1"
    facts = await fleet.unharmed()
    assert name in fleet.honest or name not in facts.state.members


async def test_a_token_that_was_used_is_worthless_to_another_device(fleet: LiveFleet, join: Join) -> None:
    token = await fleet.token()
    assert (await join(token, "invited"))[0] == 0
    status, words = await join(token, "uninvited")
    assert status != 0 and "was used already, by another request" in words and "Traceback" not in words
    await refused(fleet, "uninvited", "was used already")


async def test_a_token_that_expired_is_worthless(fleet: LiveFleet, join: Join) -> None:
    token = await fleet.token(ttl_s=1)
    identity = parse_token(token).token.hex()

    async def expired() -> bool:
        listed = await asyncio.to_thread(lambda: Admin(fleet.fleet.state).call("GET", "/v1/admin/tokens"))
        return any(row["id"] == identity and row["state"] == "expired" for row in listed["tokens"])

    await until(expired, PATIENCE_S, "the token has expired")
    status, words = await join(token, "tardy")
    assert status != 0 and f"token {identity} expired" in words
    await refused(fleet, "tardy", "expired")


async def test_anothers_name_cannot_be_joined_under(fleet: LiveFleet, join: Join) -> None:
    status, words = await join(await fleet.token(), "edge-01")
    assert status != 0 and "the name edge-01 is taken by another signing key" in words
    await refused(fleet, "edge-01", "taken by another signing key")
    status, words = await join(await fleet.token(), "coordinator-2")
    assert status != 0 and "reserved" in words
    await refused(fleet, "coordinator-2", "reserved")


async def test_a_signing_key_for_which_anything_verifies_is_refused(fleet: LiveFleet) -> None:
    weak = (1).to_bytes(32, "little")  # the neutral point: this signature of it is good for every message
    universal = weak + bytes(32)
    assert verify_ed25519(weak, universal, b"whatever I may say later") and verify_ed25519(weak, universal, b"or not")
    token = parse_token(await fleet.token())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = csr.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    digest = hashlib.sha256(request.public_bytes(Encoding.DER)).digest()
    proof = Enrolment(
        ledger=bytes(16), epoch=0, author="deniable", seq=0, public_key=weak, csr_digest=digest, token=token.token
    )
    body = {
        "token": token.token.hex(),
        "secret": token.secret.hex(),
        "name": "deniable",
        "csr": request.public_bytes(Encoding.PEM).decode(),
        "enrolment": base64.b64encode(Envelope(key_id(weak), proof.to_bytes(), universal).encode()).decode(),
    }
    client = FleetClient(token.url, lambda: mutual_tls(fleet.layout.ca))
    with pytest.raises(RefusedError, match="small order"):
        await asyncio.to_thread(client.post_json, "/v1/enrol", json.dumps(body).encode())
    await refused(fleet, "deniable", "small order")
