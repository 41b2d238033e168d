"""The HTTP API: Open Inference Protocol v2 (metadata and infer, JSON), receipts, and figures for operators.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md. Errors are {"error": one line}.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import orjson
import structlog
from fastapi import FastAPI, Request, Response

from bmoe import __version__
from bmoe.ledger.rules.policies import verifies
from bmoe.protocol.errors import BmoeError, InferenceError, InputError, RefusedError, UnavailableError
from bmoe.protocol.tensors import Tensor
from coordinator.gateway import Gateway
from coordinator.intake import DATATYPE_OF
from coordinator.jobs import Answered
from coordinator.mqtt_history import History
from coordinator.mqtt_requests import MqttRequests, owner_of
from coordinator.records import unpack_answered

log = structlog.get_logger("api")
TENANT = "public"
BODY_S = 30.0
STATUS: tuple[tuple[type[BmoeError], int], ...] = (
    (RefusedError, 403),
    (InputError, 400),
    (UnavailableError, 503),
    (InferenceError, 502),
    (BmoeError, 500),
)
Handler = Callable[[Request], Awaitable[Response]]


def build_api(gateway: Gateway) -> FastAPI:
    """The application; it holds no state of its own."""
    app = FastAPI(title="bmoe", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    routes: tuple[tuple[str, str, Callable[..., Awaitable[Response]]], ...] = (
        ("GET", "/v2/health/live", _live),
        ("GET", "/v2/health/ready", _ready),
        ("GET", "/v2", _server),
        ("GET", "/v2/models/{model}", _metadata),
        ("GET", "/v2/models/{model}/versions/{version}", _metadata),
        ("GET", "/v2/models/{model}/ready", _model_ready),
        ("POST", "/v2/models/{model}/infer", _infer),
        ("POST", "/v2/models/{model}/versions/{version}/infer", _infer),
        ("GET", "/v1/answers/{identity}/receipt", _answer_receipt),
        ("GET", "/v1/verdicts/{identity}/receipt", _verdict_receipt),
        ("GET", "/v1/requests/{identity}", _request),
        ("GET", "/v1/fleet", _fleet),
        ("GET", "/v1/statistics", _statistics),
    )
    for method, path, handler in routes:
        app.add_api_route(path, _guarded(gateway, handler), methods=[method], include_in_schema=False)
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_found)
    return app


def _guarded(gateway: Gateway, handler: Callable[..., Awaitable[Response]]) -> Handler:
    async def guarded(request: Request) -> Response:
        try:
            return await handler(gateway, request)
        except BmoeError as error:
            return _json({"error": str(error)}, _status(error))
        except Exception:
            log.exception("request_failed", path=request.url.path)
            return _json({"error": "internal error; the gateway's log has the details"}, 500)

    return guarded


def _status(error: BmoeError) -> int:
    if isinstance(error, InputError) and "is not served here" in str(error):
        return 404
    return next(status for kind, status in STATUS if isinstance(error, kind))


def take_mqtt_requests(gateway: Gateway) -> MqttRequests:
    """Answer what devices publish as requests, from now on, as HTTP clients are answered."""

    async def answer(device: str, model: str, body: bytes, where: str) -> dict[str, Any]:
        if len(body) > gateway.settings.body_bytes:
            raise InputError(f"the body exceeds {gateway.settings.body_bytes} bytes")
        with gateway.admitted():
            return _response(await gateway.infer(model, body, owner(device), where))

    def owner(device: str) -> str:
        return owner_of(gateway.state.members, device)

    history = History(gateway.journal, gateway.catalogue, _response)
    requests = MqttRequests(answer, gateway.link, _status, owner, history)
    gateway.recovery.tell(lambda outcome: requests.tell(*history.outcome(outcome)))
    gateway.take_requests(requests.take)
    return requests


async def _not_found(request: Request, error: Exception) -> Response:
    code = getattr(error, "status_code", 404)
    return _json({"error": f"no {request.method} {request.url.path} here"}, code)


async def _live(gateway: Gateway, request: Request) -> Response:
    return _json({"live": True})


async def _ready(gateway: Gateway, request: Request) -> Response:
    reasons = [
        reason
        for holds, reason in (
            (gateway.link.connected, "the link to the broker is down"),
            (bool(gateway.catalogue.names()), "no model is released"),
            (not gateway.finality.disagreement, gateway.finality.disagreement),
        )
        if not holds
    ]
    return _json({"ready": not reasons, **({"reasons": reasons} if reasons else {})}, 503 if reasons else 200)


async def _server(gateway: Gateway, request: Request) -> Response:
    return _json({"name": "bmoe", "version": __version__, "extensions": []})


async def _metadata(gateway: Gateway, request: Request) -> Response:
    _check_version(gateway, request)
    return _json(gateway.catalogue.metadata(request.path_params["model"]))


async def _model_ready(gateway: Gateway, request: Request) -> Response:
    gateway.catalogue.get(request.path_params["model"])
    return _json({"ready": True})


async def _infer(gateway: Gateway, request: Request) -> Response:
    _check_version(gateway, request)
    with gateway.admitted():
        try:
            body = await asyncio.wait_for(_body(request, gateway.settings.body_bytes), BODY_S)
        except asyncio.TimeoutError:
            raise InputError(f"the body did not come within {BODY_S:g} s") from None
        answered = await gateway.infer(request.path_params["model"], body, TENANT)
    return _json(_response(answered))


def _check_version(gateway: Gateway, request: Request) -> None:
    version = request.path_params.get("version")
    served = gateway.catalogue.get(request.path_params["model"]).statement
    if version is not None and version != str(served.version):
        raise InputError(f"model {served.model} version {version[:32]!r} is not served here; {served.version} is")


async def _body(request: Request, limit: int) -> bytes:
    """The body, never holding more than `limit` bytes of it."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise InputError(f"the body exceeds {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def _response(answered: Answered) -> dict[str, Any]:
    request, result = answered.request, answered.result
    response: dict[str, Any] = {
        "model_name": request.model.name,
        "model_version": str(request.model.statement.version),
        "outputs": [_output(t) for t in result.tensors if t.name in request.outputs],
        "parameters": {
            "request": request.id.hex(),
            "verdicts": [t.hex() for t in answered.tasks],
            "policy": request.policy,
            "assurance": "verified" if verifies(request.policy) else "unverified",
            "stage": answered.stage,
            "promise": base64.b64encode(answered.promise).decode(),
            "request_salt": result.request_salt.hex(),
            "result_salt": result.salt.hex(),
        },
    }
    if request.client_id:
        response["id"] = request.client_id
    return response


def _output(tensor: Tensor) -> dict[str, Any]:
    array = np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder("<"))
    return {
        "name": tensor.name,
        "shape": list(tensor.dims),
        "datatype": DATATYPE_OF.get(tensor.dtype, tensor.dtype.upper()),
        "data": array.tolist(),
    }


async def _answer_receipt(gateway: Gateway, request: Request) -> Response:
    return await _receipt(gateway, request, "request")


async def _verdict_receipt(gateway: Gateway, request: Request) -> Response:
    return await _receipt(gateway, request, "task")


async def _receipt(gateway: Gateway, request: Request, kind: str) -> Response:
    text = request.path_params["identity"]
    try:
        identity = bytes.fromhex(text)
    except ValueError:
        identity = b""
    if len(identity) != 16:
        raise InputError(f"an id is 32 hexadecimal digits, got {text[:64]!r}")
    return Response(await gateway.receipt(identity, kind), media_type="text/plain")


async def _request(gateway: Gateway, request: Request) -> Response:
    return _json(await outcome(gateway, request.path_params["identity"], TENANT))


async def outcome(gateway: Gateway, identity: str, tenant: str) -> dict[str, Any]:
    """What became of a request, by its id (32 hexadecimal digits) or by the client's own; raises InputError for others."""
    row = None
    if len(identity) == 32 and not set(identity) - set("0123456789abcdef"):
        row = await gateway.journal.row(bytes.fromhex(identity))
    if row is None or row.tenant != tenant:
        row = await gateway.journal.latest(tenant, identity)
    if row is None:
        raise InputError(f"request {identity[:64]!r} is not served here, or no longer kept")
    told = {"request": row.id.hex(), "id": row.client_id, "status": row.status, "received_ms": row.received_ms}
    if row.outcome is not None:
        told["response"] = _response(unpack_answered(row.outcome, gateway.catalogue.version))
    elif row.reason:
        told["reason"] = row.reason
    return told


async def _fleet(gateway: Gateway, request: Request) -> Response:
    return _json({"agents": gateway.fleet.table()})


async def _statistics(gateway: Gateway, request: Request) -> Response:
    return _json(gateway.statistics())


def _json(values: Any, code: int = 200) -> Response:
    return Response(orjson.dumps(values), status_code=code, media_type="application/json")
