"""The fleet's HTTPS server over real TLS: renewal, blobs, evidence, releases, the operator's doors, and hostile callers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from embedded_servers import PATIENCE
from identity_fleet import VALIDATOR, Peer, Site, running_site, tls_of

from bmoe.protocol.errors import InputError, RefusedError, UnavailableError
from bmoe.protocol.join_token import parse_token
from bmoe.protocol.messages import Release, open_message
from bmoe.protocol.topics import topic
from bmoe.storage.evidence import EvidenceStore
from bmoe.storage.manifest import Expert, Model, TensorSpec, render_manifest
from edge_agent.join import join

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
import onnx_models

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with running_site(tmp_path_factory.mktemp("site")) as site:
        yield site


async def test_certificate_is_renewed_before_its_end(site: Site, tmp_path: Path) -> None:
    board = await site.board("pi-renewed", tmp_path)
    csr = board.csr.read_text()
    status, _, body = await site.call("POST", "/v1/renew", {"csr": csr}, files=tls_of(board))
    renewed = x509.load_pem_x509_certificate(json.loads(body)["certificate"].encode())
    assert status == 200 and renewed.subject.rfc4514_string() == "CN=pi-renewed"
    board.certificate.write_bytes(json.loads(body)["certificate"].encode())
    async with Peer(site.settings(tls_of(board), board.name), topic(board.name, "task")) as pi:
        await pi.up()
    assert (await site.call("POST", "/v1/renew", {"csr": csr}))[0] == 403


async def test_blobs_are_resumed_and_only_named_by_digest(site: Site, tmp_path: Path) -> None:
    board = await site.board("pi-fetch", tmp_path)
    data = os.urandom(300_000)
    digest = hashlib.sha256(data).hexdigest()
    site.layout.blobs.mkdir(exist_ok=True)
    (site.layout.blobs / digest).write_bytes(data)
    path, files = f"/v1/blobs/{digest}", tls_of(board)
    assert (await site.call("GET", path, files=files))[::2] == (200, data)
    status, headers, rest = await site.call("GET", path, files=files, Range="bytes=299000-")
    assert (status, rest, headers["content-range"]) == (206, data[299_000:], "bytes 299000-299999/300000")
    assert (await site.call("GET", path, files=files, Range="bytes=0-9"))[::2] == (206, data[:10])
    status, headers, _ = await site.call("GET", path, files=files, Range="bytes=300000-")
    assert (status, headers["content-range"]) == (416, "bytes */300000")
    for odd in ("bytes=-5", "bytes=0-1,2-3", "lines=1-", "bytes=" + "0-," * 3000):
        assert (await site.call("GET", path, files=files, Range=odd))[::2] == (200, data)
    for other in ("0" * 64, digest.upper(), "..%2f..%2fidentity%2fca.key", "%2e%2e"):
        status, _, body = await site.call("GET", f"/v1/blobs/{other}", files=files)
        assert status == 404 and set(json.loads(body)) == {"error"}


async def test_evidence_is_for_validators_alone(site: Site, tmp_path: Path) -> None:
    board = await site.board("pi-curious", tmp_path)
    store = EvidenceStore(site.layout.evidence)
    await store.keep([(b"T" * 16, b"the task's input")])
    path = "/v1/evidence/" + (b"T" * 16).hex()
    assert (await site.call("GET", path, files=site.identity.tls(VALIDATOR)))[::2] == (200, b"the task's input")
    assert (await site.call("GET", path, files=tls_of(board)))[0] == 403
    assert (await site.call("GET", path, files=site.identity.tls("coordinator")))[0] == 403
    assert (await site.call("GET", path))[0] == 403
    unknown = "/v1/evidence/" + "0" * 32
    assert (await site.call("GET", unknown, files=site.identity.tls(VALIDATOR)))[0] == 404
    store.close()


def make_model(blob: bytes, version: int = 1) -> Model:
    tensor = TensorSpec("x", "float32", (None, 4))
    expert = Expert(
        "only", "only.onnx", hashlib.sha256(blob).hexdigest(), len(blob), 17, 16, True, (tensor,),
        (TensorSpec("y", "float32", (None, 4), 1e-5),),
    )  # fmt: skip
    return Model(1, "toy", version, "Apache-2.0", "", 1, "weighted_sum", (), None, (expert,))


async def test_model_is_published_once_and_its_release_is_signed(site: Site, tmp_path: Path) -> None:
    board = await site.board("pi-model", tmp_path)
    blob = onnx_models.echo(onnx_models.FLOAT, ("N", 4))
    manifest = render_manifest(make_model(blob))
    digest = hashlib.sha256(blob).hexdigest()
    path = "/v1/admin/releases?owner=acme"
    with pytest.raises(RefusedError, match="not in the store"):
        await site.admin("POST", path, manifest)
    site.layout.blobs.mkdir(exist_ok=True)
    (site.layout.blobs / digest).write_bytes(blob[:-1] + b"?" if blob[-1:] != b"?" else blob[:-1] + b"!")
    with pytest.raises(RefusedError, match="is damaged"):
        await site.admin("POST", path, manifest)
    (site.layout.blobs / digest).write_bytes(blob)
    assert (await site.admin("POST", path, manifest))["position"] > 0
    assert (await site.admin("POST", path, manifest))["position"] == 0
    _, _, raw = await site.call("GET", f"/v1/releases/{digest}", files=tls_of(board))
    release = open_message(Release, raw)
    release.verify(board.registrar)
    assert (release.header.digest.hex(), release.header.inputs) == (digest, (("x", "float32", (0, 4)),))
    assert (await site.ledger_state()).models["toy"].version == 1
    with pytest.raises(InputError, match="owner"):
        await site.admin("POST", "/v1/admin/releases", manifest)


async def test_operators_doors_open_for_the_operator_alone(site: Site, tmp_path: Path) -> None:
    board = await site.board("pi-ambitious", tmp_path)
    for files in (None, tls_of(board), site.identity.tls(VALIDATOR), site.identity.tls("coordinator")):
        assert (await site.call("POST", "/v1/admin/tokens", {"owner": "x"}, files=files))[0] == 403
        assert (await site.call("POST", "/v1/admin/devices/pi-1/revoke", {"reason": "x"}, files=files))[0] == 403
        assert (await site.call("GET", "/v1/admin/devices", files=files))[0] == 403
    token = await site.token(name="pi-named", ttl_s=60)
    spelled = parse_token(token).token.hex()
    listed = (await site.admin("GET", "/v1/admin/tokens"))["tokens"]
    assert [row["state"] for row in listed if row["id"] == spelled] == ["open"]
    await site.admin("DELETE", f"/v1/admin/tokens/{spelled}")
    with pytest.raises(RefusedError, match="revoked by the operator"):
        await asyncio.to_thread(join, tmp_path / "late", token, name="pi-named", gateway=None, force=False)
    with pytest.raises(RefusedError, match="not an enrolled device"):
        await site.admin("POST", "/v1/admin/devices/coordinator/revoke", {"reason": "x"})


async def test_hostile_requests_are_one_clear_line(site: Site) -> None:
    for method, path, body, status in (
        ("GET", "/", None, 404),
        ("GET", "/v1/nothing", None, 404),
        ("DELETE", "/v1/enrol", None, 405),
        ("POST", "/v1/enrol", b"", 400),
        ("POST", "/v1/enrol", b"[" * 60_000, 400),
        ("POST", "/v1/enrol", b"\xff\xfe", 400),
        ("POST", "/v1/enrol", b"[]", 400),
        ("POST", "/v1/enrol", b"x" * 70_000, 400),
        ("POST", "/v1/enrol", {"token": "00"}, 400),
    ):
        found, _, answer = await site.call(method, path, body, source="127.0.0.3")
        assert found == status, (path, answer)
        assert set(json.loads(answer)) == {"error"} and "Traceback" not in answer.decode()


async def test_grinding_of_tokens_is_slowed_by_address(site: Site, tmp_path: Path) -> None:
    for _ in range(10):
        assert (await site.call("POST", "/v1/enrol", {}, source="127.0.0.2"))[0] == 400
    assert (await site.call("POST", "/v1/enrol", {}, source="127.0.0.2"))[0] == 429
    assert (await site.call("GET", "/v1/ca", source="127.0.0.2"))[0] == 200
    await site.board("pi-neighbour", tmp_path)


async def test_no_answer_is_given_while_the_ledger_is_down(site: Site, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("coordinator.identity.desk.PATIENCE_S", 0.5)
    token = await site.token()
    os.kill(site.supervisor.pids()["ledger"], 19)
    try:
        with pytest.raises(UnavailableError, match="503"):
            await asyncio.to_thread(join, tmp_path, token, name="pi-patient", gateway=None, force=False)
    finally:
        os.kill(site.supervisor.pids()["ledger"], 18)
    monkeypatch.undo()
    board = await asyncio.wait_for(
        asyncio.to_thread(join, tmp_path, token, name="pi-patient", gateway=None, force=False), PATIENCE
    )
    assert (await site.ledger_state()).members["pi-patient"].public_key == board.signer.public_key
