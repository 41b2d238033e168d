"""What an operator may ask of the registrar, with the certificate bmoe-admin: tokens, devices, releases."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bmoe.protocol.errors import MessageError, RefusedError
from bmoe.protocol.schema import is_name
from bmoe.storage.manifest import MAX_MANIFEST_BYTES, Model, parse_manifest
from coordinator.identity.releases import check_blobs
from coordinator.identity.server import Fleet, peer, read_body, read_json
from coordinator.identity.tokens import ID_BYTES, TokenStore, spell_token

TTL_S = 3600
Revoke = Callable[[str, str], Awaitable[int]]
Publish = Callable[[Model, bytes, str], Awaitable[int]]


def add_admin_routes(
    app: FastAPI, fleet: Fleet, tokens: TokenStore, url: str, revoke: Revoke, publish: Publish
) -> None:
    """Add the operator's routes. `revoke(name, reason)` gives the number of sessions ended; `publish(model, manifest,
    owner)` the ledger position of the release."""

    def admin(request: Request) -> None:
        known = peer(fleet, request)
        if known.role != "administrator":
            raise RefusedError(f"this is for the operator's certificate, {known.name} is {known.role}")

    async def create_token(request: Request) -> Response:
        admin(request)
        body = await read_json(request)
        name, owner, batch, ttl_s = (body.get(k) for k in ("name", "owner", "batch", "ttl_s"))
        if not (name is None or isinstance(name, str)) or not isinstance(owner, str):
            raise MessageError('expected {"name": text or null, "owner": text, "batch": text, "ttl_s": seconds}')
        batch, ttl_s = batch if isinstance(batch, str) else "", TTL_S if ttl_s is None else ttl_s
        if type(ttl_s) is not int:
            raise MessageError(f"ttl_s must be whole seconds, found {ttl_s!r}")
        token, secret = tokens.create(name, owner, batch, ttl_s, int(fleet.clock() * 1000))
        fleet.report("token_created", token=token.hex(), name=name, owner=owner, batch=batch, ttl_s=ttl_s)
        spelled = spell_token(url, token, secret, fleet.authority.pin)
        return JSONResponse({"id": token.hex(), "token": spelled})

    async def list_tokens(request: Request) -> Response:
        admin(request)
        rows = tokens.list(int(fleet.clock() * 1000))
        return JSONResponse({"tokens": [{**vars(row), "id": row.id.hex()} for row in rows]})

    async def revoke_token(request: Request) -> Response:
        admin(request)
        spelled = request.path_params["token"]
        try:
            token = bytes.fromhex(spelled)
        except ValueError:
            token = b""
        if len(token) != ID_BYTES:
            raise MessageError(f"a token is named by {ID_BYTES} bytes in hex, found {spelled[:40]!r}")
        tokens.revoke(token, int(fleet.clock() * 1000))
        fleet.report("token_revoked", token=spelled)
        return JSONResponse({"id": spelled})

    async def list_devices(request: Request) -> Response:
        admin(request)
        return JSONResponse({"devices": _devices(fleet)})

    async def revoke_device(request: Request) -> Response:
        admin(request)
        name, reason = request.path_params["name"], (await read_json(request)).get("reason")
        if not isinstance(reason, str) or not 0 < len(reason) <= 200:
            raise MessageError("reason must be text of 1..200 characters")
        known = fleet.directory.find(name)
        if known is None or known.role != "agent":
            raise RefusedError(f"{name[:64]} is not an enrolled device")
        return JSONResponse({"name": name, "sessions_ended": await revoke(name, reason)})

    async def publish_model(request: Request) -> Response:
        admin(request)
        owner = request.query_params.get("owner")
        if not is_name(owner):
            raise MessageError("?owner= must name the model's owner by 1..64 characters a-z 0-9 -")
        manifest = await read_body(request, MAX_MANIFEST_BYTES)
        model = parse_manifest(manifest)
        await asyncio.to_thread(check_blobs, fleet.blobs, model)
        position = await publish(model, manifest, str(owner))
        fleet.report("model_published", model=model.name, version=model.version, owner=owner, position=position)
        return JSONResponse({"model": model.name, "version": model.version, "position": position})

    for path, method, handler in (
        ("/v1/admin/tokens", "POST", create_token),
        ("/v1/admin/tokens", "GET", list_tokens),
        ("/v1/admin/tokens/{token}", "DELETE", revoke_token),
        ("/v1/admin/devices", "GET", list_devices),
        ("/v1/admin/devices/{name}/revoke", "POST", revoke_device),
        ("/v1/admin/releases", "POST", publish_model),
    ):
        app.add_route(path, handler, [method])


def _devices(fleet: Fleet) -> list[dict[str, Any]]:
    return [
        {
            "name": known.name,
            "role": known.role,
            "owner": known.owner,
            "public_key": known.public_key.hex(),
            "revoked": fleet.directory.revocation(known.name),
        }
        for known in fleet.directory.everyone()
        if known.role != "administrator"
    ]
