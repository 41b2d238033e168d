"""Blobs over HTTP: files named by their SHA-256, whole or from an offset on, so that a broken download is resumed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from bmoe.protocol.errors import InputError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})")


def is_hex_digest(value: str) -> bool:
    """Whether `value` spells a SHA-256 digest our one way; nothing else may become a file name."""
    return _DIGEST.fullmatch(value) is not None


def read_blob(folder: Path, digest: str, limit: int) -> bytes:
    """A small file of `folder`, whose bytes are those of the digest; raises InputError."""
    try:
        with (folder / digest).open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"blob {digest} cannot be read: {error.strerror}") from None
    if len(data) > limit or hashlib.sha256(data).hexdigest() != digest:
        raise InputError(f"blob {digest} is damaged, or has more than {limit} bytes")
    return data


def serve_blob(folder: Path, digest: str, request: Request) -> Response:
    """The file `digest` of `folder`; 404 without it, 206 for one range, 416 for a range that is not in it.

    A Range header of any other form is ignored, as RFC 9110 section 14.2 allows.
    """
    path = folder / digest
    if not is_hex_digest(digest) or not path.is_file():
        return JSONResponse({"error": f"no blob {digest[:64]}"}, 404)
    size = path.stat().st_size
    asked = _RANGE.fullmatch(request.headers.get("range", ""))
    if asked and (int(asked[1]) >= size or (asked[2] and int(asked[2]) < int(asked[1]))):
        fault = {"error": f"range {asked[0]} is not within the blob's {size} bytes"}
        return JSONResponse(fault, 416, headers={"content-range": f"bytes */{size}"})
    response = FileResponse(path, media_type="application/octet-stream", headers={"etag": f'"{digest}"'})
    return response if asked else _Whole(response)


class _Whole(Response):
    """The file without a look at the Range header, which asks for something we do not serve."""

    def __init__(self, file: FileResponse) -> None:
        self._file = file

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        headers = [pair for pair in scope["headers"] if pair[0] != b"range"]
        await self._file({**scope, "headers": headers}, receive, send)
