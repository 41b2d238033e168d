"""The repository over fleet HTTPS, /v1/repository/PATH: metadata, blobs, receipts and statements, as bmoe.storage.targets
names them. For whoever is enrolled; nothing here is secret, and nothing is believed by those who read it.
"""

from __future__ import annotations

import re
from functools import partial

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bmoe.protocol.errors import UnknownError
from bmoe.protocol.threads import in_thread
from bmoe.storage.blobs import read_whole
from bmoe.storage.targets import METADATA_BYTES
from coordinator.identity.blobs import serve_blob
from coordinator.identity.server import Fleet, check_not_withdrawn, peer
from coordinator.identity.shelf import Shelf

_METADATA = re.compile(r"metadata/(?:[0-9]{1,10}\.)?[a-z0-9-]{1,80}\.json")
_BLOB = re.compile(r"blobs/([0-9a-f]{64})")
_RELEASE = re.compile(r"(receipts|statements)/releases/([0-9a-f]{64})")
_MODEL = re.compile(r"(receipts|statements)/models/([a-z0-9-]{1,64})/([0-9]{1,10})")


def add_repository_routes(app: FastAPI, fleet: Fleet, shelf: Shelf) -> None:
    """Add the one route."""
    path, method = ("/v1/repository/{path:path}", "GET")
    app.add_route(path, partial(_serve, fleet, shelf), [method])


async def _serve(fleet: Fleet, shelf: Shelf, request: Request) -> Response:
    known, path = peer(fleet, request), request.path_params["path"]
    try:
        if _METADATA.fullmatch(path):
            data = await in_thread(lambda: read_whole(shelf.repository.store, path, METADATA_BYTES))
            return Response(data, media_type="application/json")
        if found := _BLOB.fullmatch(path):
            check_not_withdrawn(fleet, known, found[1])
            await shelf.fetch_blob(found[1])
            return serve_blob(fleet.blobs, found[1], request)
        if found := _RELEASE.fullmatch(path):
            check_not_withdrawn(fleet, known, found[2])
            return await _stated(shelf, found[1], "release", found[2])
        if found := _MODEL.fullmatch(path):
            return await _stated(shelf, found[1], "model", f"{found[2]} {int(found[3])}")
        raise UnknownError(f"the repository has no {path[:200]}")
    except UnknownError as error:
        return JSONResponse({"error": str(error)}, 404)


async def _stated(shelf: Shelf, form: str, kind: str, name: str) -> Response:
    if form == "receipts":
        return Response(await shelf.receipt(kind, name), media_type="text/plain")
    statement = shelf.statement(kind, name)
    if statement is None:
        raise UnknownError(f"no {kind} {name} stands on this ledger")
    return Response(statement, media_type="application/cose")
