"""What an operator may ask of the registrar, with the certificate bmoe-admin: tokens, devices, releases."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bmoe.protocol.errors import MessageError, RefusedError
from bmoe.protocol.schema import is_name
from bmoe.protocol.text import is_plain
from bmoe.storage.manifest import MAX_MANIFEST_BYTES, parse_manifest
from bmoe.storage.origin import MAX_ORIGIN_BYTES, check_origin
from bmoe.storage.repository import UnsignedError
from bmoe.storage.repository_drafts import DRAFTS_BYTES, read_drafts, write_drafts
from bmoe.storage.repository_keys import read_public
from coordinator.identity.blobs import is_hex_digest, read_blob
from coordinator.identity.releases import check_blobs
from coordinator.identity.server import Fleet, peer, read_body, read_json
from coordinator.identity.shelf import Shelf
from coordinator.identity.tokens import ID_BYTES, TokenStore, spell_token

TTL_S = 3600


@dataclass(frozen=True)
class Desk:
    """What the operator's routes need. `url` goes into tokens; `revoke(name, reason)` gives the number of sessions
    ended; `publish(model, manifest, owner, hold, origin, draft)` the ledger position, 0 where the ledger has that version
    already; `models()` those that are served; `shelf` keeps the repository."""

    fleet: Fleet
    tokens: TokenStore
    url: str
    revoke: Callable[[str, str], Awaitable[int]]
    publish: Callable[..., Awaitable[int]]
    models: Callable[[], list[dict[str, Any]]] = list
    shelf: Shelf | None = None

    def now_ms(self) -> int:
        """Now, in ms since 1970."""
        return int(self.fleet.clock() * 1000)


def add_admin_routes(app: FastAPI, desk: Desk) -> None:
    """Add the operator's routes; each asks for the operator's certificate first."""
    for path, method, handler in (
        ("/v1/admin/tokens", "POST", _create_token),
        ("/v1/admin/tokens", "GET", _list_tokens),
        ("/v1/admin/tokens/{token}", "DELETE", _revoke_token),
        ("/v1/admin/devices", "GET", _list_devices),
        ("/v1/admin/devices/{name}/revoke", "POST", _revoke_device),
        ("/v1/admin/releases", "POST", _publish_model),
        ("/v1/admin/models", "GET", _list_models),
        ("/v1/admin/releases", "GET", _list_releases),
        ("/v1/admin/releases/{model}/{version}", "GET", _show_release),
        ("/v1/admin/withdrawals", "POST", _withdraw),
        ("/v1/admin/blobs/prune", "POST", _prune),
        ("/v1/admin/repository/keys", "POST", _rotate),
        ("/v1/admin/repository/unsigned", "GET", _unsigned),
        ("/v1/admin/repository/signed", "POST", _accept),
    ):
        app.add_route(path, partial(_for_operator, desk, handler), [method])


async def _for_operator(
    desk: Desk, handler: Callable[[Desk, Request], Awaitable[dict[str, Any]]], request: Request
) -> Response:
    known = peer(desk.fleet, request)
    if known.role != "administrator":
        raise RefusedError(f"this is for the operator's certificate, {known.name} is {known.role}")
    return JSONResponse(await handler(desk, request))


async def _create_token(desk: Desk, request: Request) -> dict[str, Any]:
    body = await read_json(request)
    name, owner, batch, ttl_s = (body.get(key) for key in ("name", "owner", "batch", "ttl_s"))
    ttl_s, batch = TTL_S if ttl_s is None else ttl_s, batch or ""
    texts = [value for value in (name, owner, batch) if value is not None]
    if not all(isinstance(value, str) for value in texts) or owner is None or type(ttl_s) is not int:
        raise MessageError('expected {"name": text or null, "owner": text, "batch": text, "ttl_s": whole seconds}')
    token, secret = desk.tokens.create(name, owner, batch, ttl_s, desk.now_ms())
    desk.fleet.report("token_created", token=token.hex(), name=name, owner=owner, batch=batch, ttl_s=ttl_s)
    return {"id": token.hex(), "token": spell_token(desk.url, token, secret, desk.fleet.authority.pin)}


async def _list_tokens(desk: Desk, request: Request) -> dict[str, Any]:
    return {"tokens": [{**vars(row), "id": row.id.hex()} for row in desk.tokens.list(desk.now_ms())]}


async def _revoke_token(desk: Desk, request: Request) -> dict[str, Any]:
    spelled = request.path_params["token"]
    try:
        token = bytes.fromhex(spelled)
    except ValueError:
        token = b""
    if len(token) != ID_BYTES:
        raise MessageError(f"a token is named by {ID_BYTES} bytes in hex, found {spelled[:40]!r}")
    desk.tokens.revoke(token, desk.now_ms())
    desk.fleet.report("token_revoked", token=token.hex())
    return {"id": token.hex()}


async def _list_devices(desk: Desk, request: Request) -> dict[str, Any]:
    return {"devices": _devices(desk.fleet)}


async def _revoke_device(desk: Desk, request: Request) -> dict[str, Any]:
    name, reason = request.path_params["name"], (await read_json(request)).get("reason")
    if not isinstance(reason, str) or not 0 < len(reason) <= 200 or not is_plain(reason):
        raise MessageError("reason must be text of 1..200 characters and no control characters")
    known = desk.fleet.directory.find(name)
    if known is None or known.role != "agent":
        raise RefusedError(f"{name[:64]} is not an enrolled device")
    return {"name": name, "sessions_ended": await desk.revoke(name, reason)}


async def _publish_model(desk: Desk, request: Request) -> dict[str, Any]:
    owner = request.query_params.get("owner")
    if not is_name(owner):
        raise MessageError("?owner= must name the model's owner by 1..64 characters a-z 0-9 -")
    manifest = await read_body(request, MAX_MANIFEST_BYTES)
    model = parse_manifest(manifest)
    await asyncio.to_thread(check_blobs, desk.fleet.blobs, model)
    hold, draft = (request.query_params.get(name) == "true" for name in ("hold", "to_sign"))
    try:
        position = await desk.publish(model, manifest, str(owner), hold, await _origin(desk, request), draft)
    except UnsignedError as error:
        return _to_sign(draft, error)
    desk.fleet.report("model_published", model=model.name, version=model.version, owner=owner, position=position)
    # One that was there before is not waited for: a gateway starts though its validators be away.
    final = desk.shelf is None or await desk.shelf.final(model.name, model.version, wait=position > 0)
    held = desk.shelf is not None and desk.shelf.held(model.name, model.version)
    return {"model": model.name, "version": model.version, "position": position, "final": final, "held": held}


async def _origin(desk: Desk, request: Request) -> bytes:
    """The statement of origin staged under its SHA-256, `?origin=`; nothing where none is named."""
    digest = request.query_params.get("origin", "")
    if not digest:
        return b""
    if not is_hex_digest(digest):
        raise MessageError("?origin= must be a SHA-256 in lower-case hex")
    data = await asyncio.to_thread(read_blob, desk.fleet.blobs, digest, MAX_ORIGIN_BYTES)
    check_origin(data)
    return data


async def _list_releases(desk: Desk, request: Request) -> dict[str, Any]:
    return {"releases": await _shelf(desk).list()}


async def _show_release(desk: Desk, request: Request) -> dict[str, Any]:
    model, version = request.path_params["model"], request.path_params["version"]
    if not is_name(model) or not re.fullmatch(r"[0-9]{1,10}", version):
        raise MessageError("a release is named by its model and the number of its version")
    return await _shelf(desk).show(model, int(version))


async def _withdraw(desk: Desk, request: Request) -> dict[str, Any]:
    body = await read_json(request)
    model, version, reason = (body.get(key) for key in ("model", "version", "reason"))
    if not is_name(model) or type(version) is not int or not isinstance(reason, str):
        raise MessageError('expected {"model": name, "version": number, "reason": text}')
    if not 0 < len(reason) <= 200 or not is_plain(reason):
        raise MessageError("reason must be text of 1..200 characters and no control characters")
    draft = body.get("to_sign") is True
    try:
        parts, served = await _shelf(desk).withdraw(str(model), version, reason, draft)
    except UnsignedError as error:
        return _to_sign(draft, error)
    return {"model": model, "version": version, "parts": parts, "served": served}


async def _prune(desk: Desk, request: Request) -> dict[str, Any]:
    body = await read_json(request)
    days, dry_run = body.get("days"), body.get("dry_run")
    if type(days) is not int or not 0 <= days <= 36_500 or type(dry_run) is not bool:
        raise MessageError('expected {"days": 0..36500, "dry_run": true or false}')
    return await _shelf(desk).prune(days, dry_run)


async def _rotate(desk: Desk, request: Request) -> dict[str, Any]:
    body = await read_json(request)
    role, keys, threshold, given = (body.get(key) for key in ("role", "keys", "threshold", "public_keys"))
    if not isinstance(role, str) or type(keys) is not int or type(threshold) is not int or type(given) is not list:
        raise MessageError('expected {"role": name, "keys": number, "threshold": number, "public_keys": [...]}')
    draft = body.get("to_sign") is True
    try:
        return await _shelf(desk).rotate(role[:100], keys, threshold, [read_public(key) for key in given[:99]], draft)
    except UnsignedError as error:
        return _to_sign(draft, error)


async def _unsigned(desk: Desk, request: Request) -> dict[str, Any]:
    drafts, signers = await _shelf(desk).renewals()
    return {"to_sign": write_drafts(drafts, signers).decode() if drafts else None}


async def _accept(desk: Desk, request: Request) -> dict[str, Any]:
    documents, _ = read_drafts(await read_body(request, DRAFTS_BYTES))
    if not documents:
        raise MessageError("the file holds no drafts")
    return await _shelf(desk).accept(documents)


def _to_sign(draft: bool, error: UnsignedError) -> dict[str, Any]:
    """The drafts to be signed elsewhere, if they were asked for."""
    if not draft:
        raise RefusedError(
            f"{error}; where they are kept elsewhere, --to-sign FILE writes what they must sign"
        ) from None
    return {"to_sign": write_drafts(error.drafts, error.signers).decode()}


def _shelf(desk: Desk) -> Shelf:
    if desk.shelf is None:
        raise RefusedError("this gateway keeps no repository")
    return desk.shelf


async def _list_models(desk: Desk, request: Request) -> dict[str, Any]:
    return {"models": desk.models()}


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
