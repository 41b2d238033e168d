"""The fleet's HTTPS server as a board sees it: small requests, capped replies, no library beyond the standard one."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import ssl
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from bmoe.protocol.errors import MessageError, RefusedError, UnavailableError
from bmoe.protocol.text import plain

TIMEOUT_S = 15.0
REPLY_BYTES = 4 << 20
CHUNK_BYTES = 1 << 18


class FleetClient:
    """Blocking calls to one server, each on a connection of its own. `context` makes the TLS context for each."""

    def __init__(self, url: str, context: Callable[[], ssl.SSLContext], timeout_s: float = TIMEOUT_S) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 443
        self._context, self._timeout_s = context, timeout_s

    def get(self, path: str, max_bytes: int = REPLY_BYTES) -> bytes:
        """The body of a 200 reply. Raises RefusedError for 4xx, UnavailableError for all that may pass."""
        with self._reply("GET", path) as response:
            return _whole(response, path, max_bytes)

    def get_json(self, path: str) -> dict[str, Any]:
        """The object that a 200 reply holds; raises MessageError when it is none, and as `get` does."""
        return _object(self.get(path), path)

    def date(self, path: str) -> str:
        """The header `Date` of a 200 reply, empty where it has none; raises as `get` does."""
        with self._reply("GET", path) as response:
            return response.getheader("Date", "")

    def post_json(self, path: str, body: bytes) -> dict[str, Any]:
        """Send JSON, get an object back; raises as `get_json` does."""
        with self._reply("POST", path, body) as response:
            return _object(_whole(response, path, REPLY_BYTES), path)

    def fetch(self, path: str, offset: int, max_bytes: int, sink: Callable[[bytes, bool], None]) -> None:
        """Hand the body from `offset` on to sink(chunk, from_start), chunk by chunk; raises as `get` does.

        `from_start` says that the server sent the whole again: what was there before `offset` is to be dropped.
        """
        first = True
        for begin, chunk in self._chunks(path, offset, max_bytes):
            sink(chunk, first and begin == 0)
            first = False

    def stream(self, path: str, offset: int, max_bytes: int) -> Iterator[bytes]:
        """The body from `offset` on, chunk by chunk; raises as `get` does."""
        for begin, chunk in self._chunks(path, offset, max_bytes):
            yield chunk[max(0, offset - begin) :]

    def _chunks(self, path: str, offset: int, max_bytes: int) -> Iterator[tuple[int, bytes]]:
        """(where it begins, chunk) of a body asked for from `offset` on; the server may send the whole."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._reply("GET", path, None, headers) as response:
            received = _range_start(response, offset)
            while chunk := _read(response, CHUNK_BYTES, path):
                received += len(chunk)
                if received > max_bytes:
                    raise MessageError(f"{path} has more than the {max_bytes} bytes it should have")
                yield received - len(chunk), chunk

    @contextlib.contextmanager
    def _reply(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        headers = {**(headers or {}), **({"Content-Type": "application/json"} if body is not None else {})}
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=self._timeout_s, context=self._context())
        with contextlib.closing(connection):
            with self._named(path):
                connection.request(method, path, body, headers)
                response = connection.getresponse()
            if response.status not in (200, 206):
                raise _refusal(response, path)
            yield response

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        where = f"https://{self.host}:{self.port} ({what})"
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            raise UnavailableError(f"{where}: the server's certificate is refused: {error.verify_message}") from None
        except TimeoutError:
            raise UnavailableError(f"{where}: no answer within {self._timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"{where}: {getattr(error, 'strerror', None) or error!r}") from None


def pinned(certificates: bytes, pin: bytes) -> bytes:
    """The one PEM certificate whose DER has the SHA-256 `pin`; raises RefusedError when it is another."""
    try:
        der = ssl.PEM_cert_to_DER_cert(certificates.decode("ascii").strip())
    except ValueError:
        raise MessageError("the gateway's /v1/ca is not one PEM certificate") from None
    found = hashlib.sha256(der).digest()
    if found != pin:
        raise RefusedError(
            f"the gateway's CA has the SHA-256 {found.hex()}, the token pins {pin.hex()}: "
            "this is another gateway, or somebody stands between"
        )
    return ssl.DER_cert_to_PEM_cert(der).encode()


def _read(response: http.client.HTTPResponse, size: int, path: str) -> bytes:
    try:
        return response.read(size)
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"{path}: the connection broke: {error!r}") from None


def _whole(response: http.client.HTTPResponse, path: str, max_bytes: int) -> bytes:
    body = _read(response, max_bytes + 1, path)
    if len(body) > max_bytes:
        raise MessageError(f"{path}: the reply exceeds {max_bytes} bytes")
    if response.length:  # read(n) does not raise IncompleteRead as read() does
        raise UnavailableError(f"{path}: the connection broke with {response.length} bytes missing")
    return body


def _range_start(response: http.client.HTTPResponse, offset: int) -> int:
    if response.status == 200:
        return 0
    found = response.getheader("Content-Range", "")
    if not found.startswith(f"bytes {offset}-"):
        raise MessageError(f"asked for bytes from {offset} on, the server answers {found[:60]!r}")
    return offset


def _refusal(response: http.client.HTTPResponse, path: str) -> Exception:
    body = _read(response, 4096, path)
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = response.reason
    # Shown on a terminal, and not always of a server that we know already.
    line = f"{path}: {plain(' '.join(text.split()), 300)} ({response.status})"
    return RefusedError(line) if 400 <= response.status < 500 and response.status != 429 else UnavailableError(line)


def _object(body: bytes, path: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise MessageError(f"{path}: the reply is not JSON") from None
    if not isinstance(value, dict):
        raise MessageError(f"{path}: the reply is not a JSON object")
    return value
