"""Who may ask: a gateway with TLS and API tokens; what each tenant may have, and what is refused, without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import pytest_asyncio
from fault_tools import until

from benchmarks.fleet import LocalFleet
from benchmarks.processes import program
from bmoe.client import Client
from bmoe.protocol.errors import RefusedError, UnavailableError
from coordinator.api_tokens import TokenFile
from coordinator.cli.commands import api_url
from coordinator.state_layout import StateLayout

pytestmark = pytest.mark.asyncio(loop_scope="module")
WINDOWS = np.zeros((1, 6, 100), np.float32)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalFleet]:
    """No agents: the referee answers alone. TLS by the gateway's own CA, and nobody without a token."""
    async with LocalFleet(tmp_path_factory.mktemp("access")) as fleet:
        (fleet.state / "gateway.toml").write_text('api_tls = "on"\napi_tokens = "required"\n')
        await fleet.start_gateway()
        yield fleet


def tokens(fleet: LocalFleet) -> TokenFile:
    return TokenFile(StateLayout(fleet.state).api_tokens)


def ask(fleet: LocalFleet, token: str | None, model: str = "wearable") -> str:
    """One request; the tenant's refusal is raised."""
    with contextlib.closing(Client(api_url(fleet.state), token=token, ca=StateLayout(fleet.state).ca)) as client:
        return client.infer(model, {"window": WINDOWS}).request


async def post(fleet: LocalFleet, token: str | None, **options: object) -> httpx.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    context = ssl.create_default_context(cafile=str(StateLayout(fleet.state).ca))
    async with httpx.AsyncClient(verify=context, base_url=api_url(fleet.state), headers=headers) as client:
        return await client.post("/v2/models/wearable/infer", **options)  # type: ignore[arg-type]


async def counts(fleet: LocalFleet, token: str) -> None:
    """Return when the token is known to the gateway."""

    async def known() -> bool:
        return (await post(fleet, token, content=b"{}")).status_code != 401

    await until(known, 5, "the token counts")


async def test_nobody_is_answered_in_the_clear_without_token_or_with_an_unknown_one(gateway: LocalFleet) -> None:
    with pytest.raises(UnavailableError):
        Client(api_url(gateway.state).replace("https", "http")).infer("wearable", {"window": WINDOWS})
    for token in (None, "bmoek.nobody", "x" * 5000):
        reply = await post(gateway, token, content=b"{}")
        assert (
            reply.status_code == 401
            and reply.headers["WWW-Authenticate"] == "Bearer"
            and "token" in reply.json()["error"]
        )


async def test_a_token_made_by_the_command_counts_at_once_and_one_revoked_no_more(gateway: LocalFleet) -> None:
    command = [program("bmoe"), "api-token", "create", "--tenant", "clinic", "--state", str(gateway.state)]
    token = (await asyncio.to_thread(subprocess.check_output, command, text=True)).strip()
    await counts(gateway, token)
    assert len(await asyncio.to_thread(ask, gateway, token)) == 32
    held = tokens(gateway).read()[0]
    assert held.tenant == "clinic" and token not in tokens(gateway).path.read_text(), "only its digest is kept"
    tokens(gateway).revoke(held.id)

    async def refused() -> bool:
        return (await post(gateway, token, content=b"{}")).status_code == 401

    await until(refused, 5, "the token is refused")


async def test_a_tenant_gets_its_models_its_rate_and_its_places_and_no_more(gateway: LocalFleet) -> None:
    narrow = tokens(gateway).create("narrow", models=("fashion",))
    slow = tokens(gateway).create("slow", rate=0.01, burst=2)
    await counts(gateway, narrow)
    with pytest.raises(RefusedError, match="may not ask 'wearable', only fashion"):
        await asyncio.to_thread(ask, gateway, narrow)
    for _ in range(2):
        await asyncio.to_thread(ask, gateway, slow)
    reply = await post(gateway, slow, content=b"{}")
    assert reply.status_code == 429 and int(reply.headers["Retry-After"]) > 60
    assert "0.01 times a second" in reply.json()["error"]


async def test_bodies_beyond_the_limit_and_bombs_are_refused_unread(gateway: LocalFleet, tmp_path: Path) -> None:
    import gzip

    token = tokens(gateway).create("large")
    await counts(gateway, token)
    reply = await post(gateway, token, content=bytes(17 * 1024 * 1024))
    assert reply.status_code == 413 and "at most 16777216" in reply.json()["error"]
    bomb = gzip.compress(bytes(1 << 28), 9)
    reply = await post(gateway, token, content=bomb, headers={"Content-Encoding": "gzip"})
    assert reply.status_code == 413 and "when decompressed" in reply.json()["error"]
    reply = await post(gateway, token, content=b"{}", headers={"Content-Encoding": "br"})
    assert reply.status_code == 400 and "'br'" in reply.json()["error"]
