"""The fleet's HTTPS server: joining, renewing, and what enrolled devices and validators fetch. Nothing is decided here.

Who may call what: /v1/ca, /v1/enrol and /v1/token-check anyone; the rest whoever holds a certificate that `identify`
accepts now.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from cryptography import x509
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from bmoe.protocol.errors import BmoeError, InputError, LedgerError, MessageError, RefusedError, UnavailableError
from coordinator.flower.register import check_supernode_key
from coordinator.identity.admission import facts_of, identify
from coordinator.identity.authority import Authority
from coordinator.identity.blobs import is_hex_digest, serve_blob
from coordinator.identity.directory import Directory, Known
from coordinator.identity.enrol import Enroller, read_request, read_shown_token
from coordinator.identity.failures import Failures

BODY_MAX = 64 * 1024
BODY_S = 15.0
Lookup = Callable[[bytes], "bytes | None"]
Report = Callable[..., Any]
_STATUS: tuple[tuple[type[BmoeError], int], ...] = (
    (InputError, 400),
    (RefusedError, 403),
    (UnavailableError, 503),
    (LedgerError, 503),
    (BmoeError, 500),
)


async def nothing() -> None:
    """On NATS the callout is asked at each connection, and need not be told before."""


@dataclass(frozen=True)
class Fleet:
    """All that the handlers ask: `releases`, `evidence` and `models` give bytes by digest, task id and name, or None.

    `withdrawn` holds the digests of experts taken back: agents get neither release nor blob.
    `supernode(device, key)` notes the key of a device's SuperNode, and says whether it is registered with the SuperLink.
    `admit()` returns once the broker knows of a session whose certificate was issued.
    """

    authority: Authority
    directory: Directory
    enroller: Enroller
    blobs: Path
    releases: Lookup
    evidence: Lookup
    registrar_key: bytes
    ledger: bytes
    epoch: int
    broker: tuple[str, int]
    report: Report
    clock: Callable[[], float] = time.time
    models: Callable[[str], bytes | None] = lambda name: None
    withdrawn: Container[bytes] = ()
    admit: Callable[[], Awaitable[None]] = nothing
    supernode: Callable[[str, str], bool] = lambda device, key: False


def make_app(fleet: Fleet) -> FastAPI:
    """The application, with devices' and validators' routes."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _on_http)  # type: ignore[arg-type]
    app.add_exception_handler(BmoeError, _on_ours)
    app.add_exception_handler(ClientDisconnect, _on_ours)
    app.add_exception_handler(Exception, _on_fault)
    failures = Failures()
    for path, method, handler in (
        ("/v1/ca", "GET", partial(_ca, fleet)),
        ("/v1/enrol", "POST", partial(_enrol, fleet, failures)),
        ("/v1/token-check", "POST", partial(_token_check, fleet, failures)),
        ("/v1/renew", "POST", partial(_renew, fleet)),
        ("/v1/supernode", "POST", partial(_supernode, fleet)),
        ("/v1/members", "GET", partial(_members, fleet)),
        ("/v1/releases/{digest}", "GET", partial(_release, fleet)),
        ("/v1/models/{model}", "GET", partial(_model, fleet)),
        ("/v1/blobs/{digest}", "GET", partial(_blob, fleet)),
        ("/v1/evidence/{task}", "GET", partial(_evidence, fleet)),
    ):
        app.add_route(path, handler, [method])
    return app


async def _ca(fleet: Fleet, request: Request) -> Response:
    return Response(fleet.authority.pem, media_type="application/x-pem-file")


async def _renew(fleet: Fleet, request: Request) -> Response:
    known = peer(fleet, request)
    body = await read_json(request)
    pem, session = body.get("csr"), body.get("session", "")
    if not isinstance(pem, str) or not isinstance(session, str):
        raise MessageError("csr must be a certificate request in PEM, session a text")
    certificate = fleet.enroller.renew(known, pem, session)
    if session:
        await fleet.admit()
    fleet.report("certificate_renewed", device=known.name, session=session)
    return JSONResponse({"certificate": certificate.decode()})


async def _supernode(fleet: Fleet, request: Request) -> Response:
    known = peer(fleet, request)
    if known.role != "agent":
        raise RefusedError(f"a SuperNode runs beside an agent, {known.name} is {known.role}")
    key = check_supernode_key((await read_json(request)).get("public_key"))
    return JSONResponse({"registered": await asyncio.to_thread(fleet.supernode, known.name, key)})


async def _members(fleet: Fleet, request: Request) -> Response:
    peer(fleet, request)
    return JSONResponse({"members": _statements(fleet, None)})


async def _release(fleet: Fleet, request: Request) -> Response:
    known, digest = peer(fleet, request), request.path_params["digest"]
    check_not_withdrawn(fleet, known, digest)
    found = fleet.releases(bytes.fromhex(digest)) if is_hex_digest(digest) else None
    return _found(found, "application/cose", f"no release {digest[:64]}")


async def _model(fleet: Fleet, request: Request) -> Response:
    peer(fleet, request)
    model = request.path_params["model"]
    return _found(fleet.models(model), "application/cose", f"no model {model[:64]}")


async def _blob(fleet: Fleet, request: Request) -> Response:
    known, digest = peer(fleet, request), request.path_params["digest"]
    check_not_withdrawn(fleet, known, digest)
    return serve_blob(fleet.blobs, digest, request)


def check_not_withdrawn(fleet: Fleet, known: Known, digest: str) -> None:
    """Raise RefusedError for an agent that asks for what was taken back; whoever judges old verdicts still gets it."""
    if known.role == "agent" and is_hex_digest(digest) and bytes.fromhex(digest) in fleet.withdrawn:
        raise RefusedError(f"{digest} is withdrawn")


async def _evidence(fleet: Fleet, request: Request) -> Response:
    known = peer(fleet, request)
    if known.role != "validator":
        raise RefusedError(f"evidence is for validators, {known.name} is {known.role}")
    task = request.path_params["task"]
    if not (is_hex_digest(task) or is_hex_digest(task * 2)):
        raise MessageError("evidence is named by a task's 16 bytes or an attachment's 32, in lower-case hex")
    found = await asyncio.to_thread(fleet.evidence, bytes.fromhex(task))
    return _found(found, "application/octet-stream", f"no evidence {task}")


def peer(fleet: Fleet, request: Request) -> Known:
    """Whose certificate this connection showed; raises RefusedError."""
    der = getattr(request.state, "peer", None)
    facts = None if der is None else facts_of(x509.load_der_x509_certificate(der))
    try:
        return identify(facts, fleet.directory, fleet.clock())
    except RefusedError as error:
        name = facts.name if facts else ""
        fleet.report("request_refused", device=name, path=request.url.path, reason=str(error))
        raise


async def read_body(request: Request, limit: int = BODY_MAX) -> bytes:
    """The body, of at most `limit` bytes; raises MessageError for more, UnavailableError when it does not come."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise MessageError(f"the body has more than {limit} bytes")
    except TimeoutError:
        raise UnavailableError(f"the body did not come within {BODY_S:g} s") from None
    return bytes(data)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object; raises MessageError."""
    try:
        body = orjson.loads(await read_body(request))
    except orjson.JSONDecodeError as error:
        raise MessageError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise MessageError("the body must be a JSON object")
    return body


async def _enrol(fleet: Fleet, failures: Failures, request: Request) -> Response:
    address = request.client.host if request.client else ""
    if failures.too_many(address):
        return _error("too many failed enrolments from this address: wait a minute", 429)
    device = ""
    try:
        body = await read_json(request)
        device = str(body.get("name") or "")[:64]
        applicant = read_request(body)
        device = applicant.name
        enrolled = await fleet.enroller.enrol(applicant)
    except (InputError, RefusedError) as error:
        failures.add(address)
        fleet.report("enrolment_refused", device=device, address=address, reason=str(error))
        raise
    fleet.report("enrolled", device=enrolled.name, owner=enrolled.owner, address=address, board=applicant.board)
    host, port = fleet.broker
    return JSONResponse(
        {
            "name": enrolled.name,
            "certificate": enrolled.certificate.decode(),
            "ca": fleet.authority.pem.decode(),
            "ledger": fleet.ledger.hex(),
            "epoch": fleet.epoch,
            "registrar": fleet.registrar_key.hex(),
            "owner": enrolled.owner,
            "members": _statements(fleet, enrolled.name),
            "broker": {"host": host, "port": port},
        }
    )


async def _token_check(fleet: Fleet, failures: Failures, request: Request) -> Response:
    """Whether a token is still good, for whoever shows its secret; counted like failed enrolments."""
    address = request.client.host if request.client else ""
    if failures.too_many(address):
        return _error("too many failed enrolments from this address: wait a minute", 429)
    try:
        grant = fleet.enroller.examine(*read_shown_token(await read_json(request)))
    except (InputError, RefusedError):
        failures.add(address)
        raise
    return JSONResponse({"name": grant.name, "owner": grant.owner, "expires_ms": grant.expires_ms})


def _statements(fleet: Fleet, name: str | None) -> list[str]:
    """The signed memberships of all coordinators and validators, and of `name`, in base64."""
    chosen = [k for k in fleet.directory.everyone() if k.role in ("coordinator", "validator") or k.name == name]
    return [base64.b64encode(known.statement).decode() for known in chosen]


def _found(data: bytes | None, media_type: str, otherwise: str) -> Response:
    return _error(otherwise, 404) if data is None else Response(data, media_type=media_type)


def _error(line: str, status: int) -> JSONResponse:
    return JSONResponse({"error": line}, status)


async def _on_http(request: Request, error: HTTPException) -> Response:
    line = f"no such resource: {request.method} {request.url.path[:200]}" if error.status_code == 404 else error.detail
    return _error(line, error.status_code)


async def _on_ours(request: Request, error: Exception) -> Response:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 400)
    return _error(str(error) or "the request broke off", status)


async def _on_fault(request: Request, error: Exception) -> Response:
    return _error("a fault of the server; its log has the details", 500)
