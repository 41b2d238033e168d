"""Who may ask: a gateway with TLS and API tokens; what each tenant may have, and what is refused, without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from fault_tools import until

from benchmarks.fleet import LocalFleet
from benchmarks.processes import program
from bmoe.client import Client
from bmoe.ledger.rules.entries import Answer, Verdict, parse_entry
from bmoe.ledger.rules.receipt_format import parse_receipt
from bmoe.protocol.errors import QuotaError, UnavailableError
from coordinator.api_tokens import AdmissionsFile
from coordinator.cli.admin import Admin
from coordinator.cli.commands import api_url
from coordinator.embedded.ports import read_ports
from coordinator.state_layout import StateLayout
from coordinator.tenants import Tenant

pytestmark = pytest.mark.asyncio(loop_scope="module")
WINDOWS = np.zeros((1, 6, 100), np.float32)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalFleet]:
    """No agents: the referee answers alone. TLS by the gateway's own CA, and nobody without a token."""
    async with LocalFleet(tmp_path_factory.mktemp("access")) as fleet:
        (fleet.state / "gateway.toml").write_text('api_tls = "on"\napi_tokens = "required"\n')
        await fleet.start_gateway()
        yield fleet


def tokens(fleet: LocalFleet) -> AdmissionsFile:
    return AdmissionsFile(StateLayout(fleet.state).api_tokens)


def ask(fleet: LocalFleet, token: str | None, model: str = "wearable") -> str:
    """One request; the tenant's refusal is raised."""
    with contextlib.closing(Client(api_url(fleet.state), token=token, ca=StateLayout(fleet.state).ca)) as client:
        return client.infer(model, {"window": WINDOWS}).request


async def post(fleet: LocalFleet, token: str | None, **options: Any) -> httpx.Response:
    return await call(fleet, "POST", "/v2/models/wearable/infer", token, **options)


async def call(fleet: LocalFleet, method: str, path: str, token: str | None, **options: Any) -> httpx.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    context = ssl.create_default_context(cafile=str(StateLayout(fleet.state).ca))
    async with httpx.AsyncClient(verify=context, base_url=api_url(fleet.state), headers=headers) as client:
        return await client.request(method, path, **options)


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
    held = tokens(gateway).read().tokens[0]
    assert held.tenant == "clinic" and token not in tokens(gateway).path.read_text(), "only its digest is kept"
    tokens(gateway).revoke(held.id)

    async def refused() -> bool:
        return (await post(gateway, token, content=b"{}")).status_code == 401

    await until(refused, 5, "the token is refused")


async def test_a_tenant_gets_its_models_its_rate_and_its_places_and_no_more(gateway: LocalFleet) -> None:
    command = [program("bmoe"), "tenant", "set", "narrow", "--model", "fashion", "--state", str(gateway.state)]
    await asyncio.to_thread(subprocess.check_call, command, stdout=subprocess.DEVNULL)
    narrow = tokens(gateway).create("narrow")
    tokens(gateway).limit(Tenant("slow", rate=0.01, burst=2))
    slow, same = tokens(gateway).create("slow"), tokens(gateway).create("slow")
    await counts(gateway, narrow)
    for method, path in (("POST", "/v2/models/wearable/infer"), ("GET", "/v2/models/wearable")):
        reply = await call(gateway, method, path, narrow)
        assert reply.status_code == 403 and "may not ask 'wearable', only fashion" in reply.json()["error"]
    for token in (slow, same):
        await asyncio.to_thread(ask, gateway, token)
    reply = await post(gateway, slow, content=b"{}")
    assert reply.status_code == 429 and int(reply.headers["Retry-After"]) > 60
    assert "0.01 times a second" in reply.json()["error"]
    with pytest.raises(QuotaError) as refused:
        await asyncio.to_thread(ask, gateway, same)
    assert refused.value.retry_s > 60, "the limit is the tenant's, whichever token it shows"
    tokens(gateway).limit(Tenant("slow"))

    async def again() -> bool:
        return (await post(gateway, slow, content=b"{}")).status_code == 400

    await until(again, 5, "the limit is gone without a restart")


async def test_a_tenant_sees_its_own_receipts_and_requests_and_the_operator_the_fleet(gateway: LocalFleet) -> None:
    clinic, other = tokens(gateway).create("clinic"), tokens(gateway).create("other")
    operator = tokens(gateway).create("ops", operator=True)
    await counts(gateway, operator)
    with contextlib.closing(Client(api_url(gateway.state), token=clinic, ca=StateLayout(gateway.state).ca)) as client:
        answer = await asyncio.to_thread(client.infer, "wearable", {"window": WINDOWS}, wait="final", request_id="mine")
    receipt, verdict = f"/v1/answers/{answer.request}/receipt", f"/v1/verdicts/{answer.verdicts[0]}/receipt"
    for path in (receipt, verdict):
        own = await call(gateway, "GET", path, clinic)
        entry = parse_entry(parse_receipt(own.content).evidence.leaf)
        assert own.status_code == 200 and isinstance(entry, Answer | Verdict) and entry.tenant == "clinic"
        assert (await call(gateway, "GET", path, other)).status_code == 404
        assert (await call(gateway, "GET", path, operator)).status_code == 200
    assert (await call(gateway, "GET", "/v1/requests/mine", clinic)).json()["request"] == answer.request
    for asked in ("mine", answer.request):
        assert (await call(gateway, "GET", f"/v1/requests/{asked}", other)).status_code == 404
    for path in ("/v1/fleet", "/v1/statistics"):
        assert (await call(gateway, "GET", path, clinic)).status_code == 403
        assert (await call(gateway, "GET", path, None)).status_code == 401
        assert (await call(gateway, "GET", path, operator)).status_code == 200


async def test_a_crowd_that_never_shakes_hands_holds_up_neither_the_api_nor_the_fleets_server(
    gateway: LocalFleet,
) -> None:
    """More silent callers than either server has places for one address."""
    token = tokens(gateway).create("patient")
    ports = read_ports(gateway.state)
    crowd = [await asyncio.open_connection("127.0.0.1", ports[name]) for name in ("api", "fleet") for _ in range(300)]
    await counts(gateway, token)
    await asyncio.to_thread(ask, gateway, token)
    assert "devices" in await asyncio.to_thread(Admin(gateway.state).call, "GET", "/v1/admin/devices")
    for _, writer in crowd:
        writer.close()


async def test_bodies_beyond_the_limit_and_bombs_are_refused_unread(gateway: LocalFleet, tmp_path: Path) -> None:
    import gzip

    token = tokens(gateway).create("large")
    await counts(gateway, token)
    reply = await post(gateway, token, content=bytes(17 * 1024 * 1024))
    assert reply.status_code == 413 and "at most 16777216" in reply.json()["error"]
    bomb = gzip.compress(bytes(1 << 26), 9)
    reply = await post(gateway, token, content=bomb, headers={"Content-Encoding": "gzip"})
    assert reply.status_code == 413 and "when decompressed" in reply.json()["error"]
    reply = await post(gateway, token, content=b"{}", headers={"Content-Encoding": "br"})
    assert reply.status_code == 400 and "'br'" in reply.json()["error"]
