"""The Python client: arrays in, verified arrays out, over the Open Inference Protocol v2. Needs numpy alone.

from bmoe.client import Client
answer = Client("http://127.0.0.1:8080").infer("wearable", {"window": windows})
answer.outputs["probabilities"], answer.verdicts
"""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmoe.protocol.errors import InputError, RefusedError, UnavailableError

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
_DTYPES = {v: k for k, v in DATATYPES.items()}
REPLY_MAX = 256 * 1024 * 1024


@dataclass(frozen=True)
class Answer:
    """A verified answer: arrays by output name, the ids to ask receipts with, and how far the verdicts had got."""

    outputs: dict[str, np.ndarray]
    request: str
    verdicts: tuple[str, ...]
    stage: str
    assurance: str
    parameters: dict[str, Any]


class Client:
    """A connection to one gateway, kept open between calls. Not for several threads at once: make one each."""

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise InputError(f"the gateway's URL must be http://HOST:PORT, got {url!r}")
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        *,
        policy: str | None = None,
        wait: str | None = None,
    ) -> Answer:
        """Ask a model. `inputs` maps input names to arrays of the dtype that the model declares.

        Raises InputError when the gateway refuses the request, UnavailableError when it gives no answer.
        """
        parameters = {k: v for k, v in (("policy", policy), ("wait", wait)) if v is not None}
        tensors = [_tensor(name, np.asarray(array)) for name, array in inputs.items()]
        body = json.dumps({"inputs": tensors, "parameters": parameters}).encode()
        reply = self._json("POST", f"/v2/models/{_quoted(model)}/infer", body)
        given = reply["parameters"]
        outputs = {o["name"]: _array(o) for o in reply["outputs"]}
        return Answer(outputs, given["request"], tuple(given["verdicts"]), given["stage"], given["assurance"], given)

    def metadata(self, model: str) -> dict[str, Any]:
        """The model's inputs, outputs and versions."""
        return self._json("GET", f"/v2/models/{_quoted(model)}")

    def receipt(self, request: str) -> bytes:
        """The receipt of an answer: one file that `bmoe audit` checks offline."""
        return self._call("GET", f"/v1/answers/{_quoted(request)}/receipt")

    def verdict_receipt(self, verdict: str) -> bytes:
        """The receipt of one verdict."""
        return self._call("GET", f"/v1/verdicts/{_quoted(verdict)}/receipt")

    def outcome(self, request: str) -> dict[str, Any]:
        """What became of a request, by its id or by the id that its client gave it: `status` is accepted, answered
        (then `response` is what the client was told) or failed (then `reason` says why)."""
        return self._json("GET", f"/v1/requests/{_quoted(request)}")

    def fleet(self) -> list[dict[str, Any]]:
        """One row an agent: standing, presence, health."""
        return self._json("GET", "/v1/fleet")["agents"]

    def statistics(self) -> dict[str, Any]:
        """The gateway's figures."""
        return self._json("GET", "/v1/statistics")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _json(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        reply = self._call(method, path, body)
        try:
            return json.loads(reply)
        except ValueError as error:
            raise UnavailableError(f"the gateway's reply to {path} is not JSON: {error}") from error

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[http.client.HTTPResponse, bytes]:
        """One request; once more on a fresh connection if the kept one turns out to have been closed meanwhile."""
        kept = self._connection.sock is not None
        headers = {"Content-Type": "application/json"} if body else {}
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            if not kept or not _closed_while_idle(error):
                raise
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        return response, response.read(REPLY_MAX)

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            response, reply = self._exchange(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            where = f"{self._connection.host}:{self._connection.port}"
            raise UnavailableError(f"gateway {where}: {str(error) or type(error).__name__}") from error
        if response.status == 200:
            return reply
        raise _error(response.status, reply)


def _closed_while_idle(error: Exception) -> bool:
    return isinstance(error, (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError))


def _error(status: int, reply: bytes) -> Exception:
    try:
        message = str(json.loads(reply)["error"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {status}"
    if status in (401, 403, 429):
        return RefusedError(message)
    return InputError(message) if status < 500 else UnavailableError(message)


def _tensor(name: str, array: np.ndarray) -> dict[str, Any]:
    datatype = DATATYPES.get(str(array.dtype))
    if datatype is None:
        raise InputError(f"input {name!r}: arrays of {array.dtype} cannot be sent as JSON")
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.reshape(-1).tolist()}


def _array(output: Mapping[str, Any]) -> np.ndarray:
    return np.array(output["data"], dtype=_DTYPES[output["datatype"]]).reshape(output["shape"])


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="")
