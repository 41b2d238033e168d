"""The HTTP API beside the infer route: Open Inference Protocol v2 metadata, receipts, and figures for operators.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md. Errors are {"error": one line}.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request, Response

from bmoe import __version__
from bmoe.ledger.rules.entries import parse_entry
from bmoe.ledger.rules.receipt_format import parse_receipt
from bmoe.protocol.errors import BmoeError, InputError, LimitError, RefusedError, UnknownError
from coordinator.gateway import Gateway
from coordinator.infer_route import App, InferRoute
from coordinator.jobs import Answered
from coordinator.mqtt_history import History
from coordinator.mqtt_requests import MqttRequests, owner_of
from coordinator.records import unpack_answered
from coordinator.replies import is_large, reply_values, status_of
from coordinator.rollout.plan import parse_plan
from coordinator.tenants import check_model

log = structlog.get_logger("api")
Answering = Callable[[Gateway, Request], Awaitable[Response]]
EXTENSIONS = ["binary_tensor_data"]
ANYONE, TENANT, OPERATOR = range(3)
OPERATOR_BODY_MAX = 64 * 1024


def build_api(gateway: Gateway) -> App:
    """The application; it holds no state of its own."""
    app = FastAPI(title="bmoe", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    for_operators: tuple[tuple[str, Answering], ...] = (
        ("/v1/fleet", _fleet),
        ("/v1/statistics", _statistics),
        ("/v1/rollouts", _rollouts),
    )
    for_all: tuple[tuple[str, Answering], ...] = (("/v2/health/live", _live), ("/v2/health/ready", _ready))
    for_tenants: tuple[tuple[str, Answering], ...] = (
        ("/v2", _server),
        ("/v2/models/{model}", _metadata),
        ("/v2/models/{model}/versions/{version}", _metadata),
        ("/v2/models/{model}/ready", _model_ready),
        ("/v2/models/{model}/versions/{version}/ready", _model_ready),
        ("/v1/answers/{identity}/receipt", _answer_receipt),
        ("/v1/verdicts/{identity}/receipt", _verdict_receipt),
        ("/v1/requests/{identity}", _request),
    )
    for routes, who in ((for_all, ANYONE), (for_tenants, TENANT), (for_operators, OPERATOR)):
        for path, handler in routes:
            guarded = _guarded(gateway, handler, who)
            app.add_api_route(path, guarded, methods=["GET", "HEAD"], include_in_schema=False)
    for path, handler in (("/v1/rollouts", _start_rollout), ("/v1/rollouts/{model}/{what}", _act_on_rollout)):
        app.add_api_route(path, _guarded(gateway, handler, OPERATOR), methods=["POST"], include_in_schema=False)
    app.add_exception_handler(404, _not_found)
    app.add_exception_handler(405, _not_found)
    return InferRoute(gateway, app)


def _guarded(gateway: Gateway, handler: Answering, who: int) -> Callable[[Request], Awaitable[Response]]:
    async def guarded(request: Request) -> Response:
        """Who may not ask is refused; an error of ours becomes its status and one line of JSON."""
        try:
            given, now = request.headers.get("authorization"), time.monotonic()
            if who >= TENANT:
                request.state.tenant = gateway.access.tenant(given, now)
                request.state.operator = gateway.access.is_operator(given, now)
            if who == OPERATOR and not request.state.operator:
                raise RefusedError("this is for operators: bmoe api-token create --operator")
            return await handler(gateway, request)
        except BmoeError as error:
            status = status_of(error)
            return _json({"error": str(error)}, status, {"WWW-Authenticate": "Bearer"} if status == 401 else None)
        except Exception:
            log.exception("request_failed", path=request.url.path)
            return _json({"error": "internal error; the gateway's log has the details"}, 500)

    return guarded


def take_mqtt_requests(gateway: Gateway) -> MqttRequests:
    """Answer what devices publish as requests, from now on, as HTTP clients are answered."""

    async def answer(device: str, model: str, body: bytes, where: str) -> tuple[bytes, str]:
        """Answer a device's request as its owner's, within the same bounds as over HTTP."""
        if len(body) > gateway.settings.body_bytes:
            raise LimitError(f"the body exceeds {gateway.settings.body_bytes} bytes")
        tenant = gateway.access.owner(owner(device))
        with gateway.admitted(), gateway.quotas.admitted(tenant, model, time.monotonic()):
            answered = await gateway.infer(model, body, tenant.name, reply_to=where)
            return await respond(answered), answered.request.id.hex()

    async def respond(answered: Answered) -> bytes:
        def written() -> bytes:
            return orjson.dumps(reply_values(answered))

        return await gateway.aside(written) if is_large(answered) else written()

    def owner(device: str) -> str:
        return owner_of(gateway.state.members, device)

    history = History(gateway.journal, gateway.catalogue, respond)
    requests = MqttRequests(answer, gateway.link, status_of, owner, history, gateway.bodies, gateway.aside)
    gateway.recovery.tell(lambda outcome: requests.tell(history.outcome(outcome)))
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
    return _json({"name": "bmoe", "version": __version__, "extensions": EXTENSIONS})


async def _metadata(gateway: Gateway, request: Request) -> Response:
    check_model(request.state.tenant, request.path_params["model"])
    gateway.catalogue.check_version(request.path_params["model"], request.path_params.get("version"))
    return _json(gateway.catalogue.metadata(request.path_params["model"]))


async def _model_ready(gateway: Gateway, request: Request) -> Response:
    check_model(request.state.tenant, request.path_params["model"])
    gateway.catalogue.check_version(request.path_params["model"], request.path_params.get("version"))
    return _json({"name": request.path_params["model"], "ready": True})


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
    receipt = await gateway.receipts.get(identity, kind)
    if not request.state.operator:
        entry = parse_entry(parse_receipt(receipt).evidence.leaf)
        if getattr(entry, "tenant", None) != request.state.tenant.name:
            raise UnknownError(f"tenant {request.state.tenant.name} has no receipt {text}")
    return Response(receipt, media_type="text/plain")


async def _request(gateway: Gateway, request: Request) -> Response:
    return _json(await outcome(gateway, request.path_params["identity"], request.state.tenant.name))


async def outcome(gateway: Gateway, identity: str, tenant: str) -> dict[str, Any]:
    """What became of a request, by its id (32 hexadecimal digits) or by the client's own; raises UnknownError for others."""
    row = None
    if len(identity) == 32 and not set(identity) - set("0123456789abcdef"):
        row = await gateway.journal.row(bytes.fromhex(identity))
    if row is None or row.tenant != tenant:
        row = await gateway.journal.latest(tenant, identity)
    if row is None:
        raise UnknownError(f"request {identity[:64]!r} is not served here, or no longer kept")
    told = {"request": row.id.hex(), "id": row.client_id, "status": row.status, "received_ms": row.received_ms}
    if row.outcome is not None:
        told["response"] = reply_values(unpack_answered(row.outcome, gateway.catalogue.version))
    elif row.reason:
        told["reason"] = row.reason
    return told


async def _fleet(gateway: Gateway, request: Request) -> Response:
    return _json({"agents": gateway.fleet.table()})


async def _rollouts(gateway: Gateway, request: Request) -> Response:
    return _json({"rollouts": gateway.rollouts.table(), "ends": list(gateway.rollouts_ended.ends)})


async def _start_rollout(gateway: Gateway, request: Request) -> Response:
    body = await _object(request)
    model, version, plan = body.get("model"), body.get("version"), body.get("plan") or {}
    if not isinstance(model, str) or not (version is None or type(version) is int) or not isinstance(plan, dict):
        raise InputError('expected {"model": name, "version": number or null, "plan": {...}}')
    started = await gateway.rollouts.start(model, version, parse_plan(plan))
    return _json({"rollout": started.rollout.hex(), "model": model, "version": started.version})


async def _act_on_rollout(gateway: Gateway, request: Request) -> Response:
    model, what = request.path_params["model"], request.path_params["what"]
    reason = (await _object(request)).get("reason") or ""
    if what not in ("pause", "resume", "abort") or not isinstance(reason, str):
        raise InputError("a rollout is paused, resumed or aborted, with a reason that is text")
    found = await gateway.rollouts.act(model, what, reason)
    return _json({"rollout": found.rollout.hex(), "model": model, "version": found.version, "stage": found.stage})


async def _object(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > OPERATOR_BODY_MAX:
            raise LimitError(f"the body has more than {OPERATOR_BODY_MAX} bytes")
    try:
        body = orjson.loads(bytes(data) or b"{}")
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InputError("the body must be a JSON object")
    return body


async def _statistics(gateway: Gateway, request: Request) -> Response:
    return _json(gateway.statistics())


def _json(values: Any, code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(values), status_code=code, media_type="application/json", headers=headers)
