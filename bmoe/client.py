"""The Python client: arrays in, verified arrays out, over the Open Inference Protocol v2. Needs numpy alone.

from bmoe.client import Client
answer = Client("http://127.0.0.1:8080").infer("wearable", {"window": windows})
answer.outputs["probabilities"], answer.verdicts
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bmoe.protocol.errors import (
    AuthenticationError,
    InputError,
    LimitError,
    QuotaError,
    RefusedError,
    UnavailableError,
    UnknownError,
)
from bmoe.protocol.text import plain

DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
_DTYPES = {v: k for k, v in DATATYPES.items()}
REPLY_MAX = 256 * 1024 * 1024
ERRORS = {401: AuthenticationError, 403: RefusedError, 404: UnknownError, 413: LimitError}
HEAD_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Answer:
    """A verified answer: arrays by output name, the ids to ask receipts with, how far the verdicts had got, and by which
    version of the model."""

    outputs: dict[str, np.ndarray]
    request: str
    verdicts: tuple[str, ...]
    stage: str
    assurance: str
    parameters: dict[str, Any]
    version: str = ""


class Client:
    """A connection to one gateway, kept open between calls. Not for several threads at once: make one each.

    `token` is an API token (`bmoe api-token create`); `ca` a PEM file with the CA that the gateway's certificate is
    by, the system's own where none is given.
    """

    def __init__(
        self, url: str, timeout_s: float = 60.0, *, token: str | None = None, ca: str | os.PathLike[str] | None = None
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"the gateway's URL must be http://HOST:PORT or https://HOST:PORT, got {url!r}")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        if parts.scheme == "http":
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)
            return
        try:
            context = ssl.create_default_context(cafile=None if ca is None else os.fspath(ca))
        except OSError as error:  # ssl.SSLError is one
            raise InputError(f"the CA file {ca} cannot be used: {error}") from error
        self._connection = http.client.HTTPSConnection(
            parts.hostname, parts.port or 443, timeout=timeout_s, context=context
        )

    def infer(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        *,
        policy: str | None = None,
        wait: str | None = None,
        binary: bool = True,
        request_id: str | None = None,
    ) -> Answer:
        """Ask a model. `inputs` maps input names to arrays of the dtype that the model declares.

        Tensors travel as their bytes; with `binary=False` as JSON, which is for people to read. `request_id` is a name
        of yours, by which `outcome` knows the request also when no answer came. Raises InputError for a bad request,
        RefusedError where its sender may not make it (QuotaError: not now), UnavailableError when there is no answer.
        """
        parameters: dict[str, Any] = {k: v for k, v in (("policy", policy), ("wait", wait)) if v is not None}
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        tensors = [_tensor(name, array, binary) for name, array in arrays.items()]
        headers = {}
        if binary:
            parameters["binary_data_output"] = True
        named = {} if request_id is None else {"id": request_id}
        body = json.dumps({**named, "inputs": tensors, "parameters": parameters}).encode()
        if binary:
            headers[HEAD_LENGTH] = str(len(body))
            body = b"".join([body, *(_bytes(array) for array in arrays.values())])
        response, reply = self._call_with_headers("POST", f"/v2/models/{_quoted(model)}/infer", body, headers)
        return read_answer(reply, response.headers.get(HEAD_LENGTH))

    def ready(self) -> bool:
        """Whether the gateway can answer now; raises UnavailableError when nobody is there."""
        try:
            return bool(self._json("GET", "/v2/health/ready").get("ready"))
        except UnavailableError as error:
            if error.__cause__ is not None:  # nobody listens; a gateway that is not ready says so with a 503
                raise
            return False

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
        return list(self._json("GET", "/v1/fleet").get("agents", ()))

    def statistics(self) -> dict[str, Any]:
        """The gateway's figures."""
        return self._json("GET", "/v1/statistics")

    def rollouts(self) -> list[dict[str, Any]]:
        """The latest rollout of each model: its stage, its wave, what was seen of it, and why it ended."""
        return list(self._json("GET", "/v1/rollouts").get("rollouts", ()))

    def ended_rollouts(self) -> list[dict[str, Any]]:
        """How rollouts ended and why, oldest first: model, version, stage, reason, at (ledger time, ms since 1970)."""
        return list(self._json("GET", "/v1/rollouts").get("ends", ()))

    def start_rollout(
        self, model: str, version: int | None = None, plan: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Begin to bring a published version to the fleet; `plan` as coordinator/rollout/plan.py has it."""
        body = json.dumps({"model": model, "version": version, "plan": dict(plan or {})}).encode()
        return self._json("POST", "/v1/rollouts", body)

    def act_on_rollout(self, model: str, what: str, reason: str = "") -> dict[str, Any]:
        """pause, resume or abort the rollout of a model that is under way."""
        body = json.dumps({"reason": reason}).encode()
        return self._json("POST", f"/v1/rollouts/{_quoted(model)}/{what}", body)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _json(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        return _object(self._call(method, path, body), path)

    def _exchange(
        self, method: str, path: str, body: bytes | None, more: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """One request; once more on a fresh connection if the kept one turns out to have been closed meanwhile."""
        kept = self._connection.sock is not None
        kind = "application/octet-stream" if HEAD_LENGTH in more else "application/json"
        headers = {**self._headers, **more, **({"Content-Type": kind} if body else {})}
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            if not kept or not _closed_while_idle(error):
                raise
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        reply = response.read(REPLY_MAX + 1)
        if len(reply) > REPLY_MAX:
            self._connection.close()
            raise UnavailableError(f"the gateway's reply to {path} exceeds {REPLY_MAX} bytes")
        return response, reply

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        return self._call_with_headers(method, path, body, {})[1]

    def _call_with_headers(
        self, method: str, path: str, body: bytes | None, more: dict[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        try:
            response, reply = self._exchange(method, path, body, more)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            where = f"{self._connection.host}:{self._connection.port}"
            raise UnavailableError(f"gateway {where}: {str(error) or type(error).__name__}") from error
        if response.status == 200:
            return response, reply
        raise _error(response, reply)


def read_answer(reply: bytes, head_length: str | None = None) -> Answer:
    """The answer in an infer reply, whose JSON head is `head_length` bytes long where binary tensors follow it.

    Raises UnavailableError for bytes that are no such reply.
    """
    try:
        head = len(reply) if head_length is None else int(head_length)
        values, rest = _object(reply[:head], "an infer request"), memoryview(reply)[head:]
        given = values["parameters"]
        outputs = {}
        for output in values["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size")
            outputs[str(output["name"])] = _array(output, None if size is None else rest[:size])
            rest = rest[size or 0 :]
        verdicts = tuple(map(str, given["verdicts"]))
        stage, assurance = str(given["stage"]), str(given["assurance"])
        version = str(values.get("model_version", ""))
        return Answer(outputs, str(given["request"]), verdicts, stage, assurance, given, version)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise UnavailableError(
            f"the gateway's reply cannot be read: {str(error)[:200] or type(error).__name__}"
        ) from error


def _object(reply: bytes, what: str) -> dict[str, Any]:
    try:
        values = json.loads(reply)
    except (ValueError, RecursionError) as error:
        raise UnavailableError(f"the gateway's reply to {what} is not JSON: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise UnavailableError(f"the gateway's reply to {what} is no JSON object")
    return values


def _closed_while_idle(error: Exception) -> bool:
    return isinstance(error, (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError))


def _error(response: http.client.HTTPResponse, reply: bytes) -> Exception:
    try:
        message = plain(json.loads(reply)["error"], 2000)
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f"HTTP {response.status}"
    if response.status == 429:
        after = response.headers.get("Retry-After", "")
        return QuotaError(message, float(after) if after.isascii() and after.isdigit() else 1.0)
    kind = ERRORS.get(response.status, InputError if response.status < 500 else UnavailableError)
    return kind(message)


def _tensor(name: str, array: np.ndarray, binary: bool) -> dict[str, Any]:
    datatype = DATATYPES.get(str(array.dtype))
    if datatype is None or (datatype == "FP16" and not binary):
        raise InputError(f"input {name!r}: arrays of {array.dtype} cannot be sent{'' if binary else ' as JSON'}")
    described = {"name": name, "shape": list(array.shape), "datatype": datatype}
    if binary:
        return {**described, "parameters": {"binary_data_size": array.nbytes}}
    return {**described, "data": array.reshape(-1).tolist()}


def _bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _array(output: Mapping[str, Any], binary: memoryview | None) -> np.ndarray:
    dtype = np.dtype(_DTYPES[output["datatype"]])
    if binary is None:
        if str in set(map(type, output["data"])):  # numpy would make a text of every number, as long as the longest
            raise UnavailableError("the gateway's reply has text among its numbers: it is malformed")
        return np.array(output["data"], dtype=dtype).reshape(output["shape"])
    return np.frombuffer(binary, dtype.newbyteorder("<")).astype(dtype).reshape(output["shape"])


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="")
