"""What clients are told, over HTTP and MQTT alike: answers in the form of the Open Inference Protocol v2, and statuses.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md; binary outputs as in intake.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson

from bmoe.ledger.rules.policies import verifies
from bmoe.protocol.errors import (
    AuthenticationError,
    BmoeError,
    InferenceError,
    InputError,
    LimitError,
    QuotaError,
    RefusedError,
    UnavailableError,
    UnknownError,
)
from bmoe.protocol.tensors import Tensor
from coordinator.intake import DATATYPE_OF
from coordinator.jobs import Answered

# The first that fits counts: what is special stands before what it is a kind of.
STATUS: tuple[tuple[type[BmoeError], int], ...] = (
    (AuthenticationError, 401),
    (QuotaError, 429),
    (RefusedError, 403),
    (UnknownError, 404),
    (LimitError, 413),
    (InputError, 400),
    (UnavailableError, 503),
    (InferenceError, 502),
    (BmoeError, 500),
)
LARGE_BYTES = 64 * 1024


def status_of(error: BmoeError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status in STATUS if isinstance(error, kind))


def is_large(answered: Answered) -> bool:
    """Whether spelling its outputs as JSON would hold up everybody else."""
    binary = answered.request.binary
    return sum(len(t.data) for t in answered.result.tensors if t.name not in binary) > LARGE_BYTES


def reply_of(answered: Answered) -> tuple[int | None, bytes]:
    """An answer's bytes; where some outputs go as binary data, behind a JSON head of the length given."""
    binary = answered.request.binary
    if not binary:
        return None, orjson.dumps(reply_values(answered))
    values = reply_values(answered)
    by_name = {t.name: t for t in answered.result.tensors}
    head = orjson.dumps(values)
    return len(head), b"".join([head, *(by_name[o["name"]].data for o in values["outputs"] if o["name"] in binary)])


def reply_values(answered: Answered) -> dict[str, Any]:
    """An answer as the JSON object of an infer response."""
    request, result = answered.request, answered.result
    by_name = {t.name: t for t in result.tensors}
    response: dict[str, Any] = {
        "model_name": request.model.name,
        "model_version": str(request.model.statement.version),
        "outputs": [_output(by_name[name], name in request.binary) for name in request.outputs],
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


def _output(tensor: Tensor, binary: bool) -> dict[str, Any]:
    described = {
        "name": tensor.name,
        "shape": list(tensor.dims),
        "datatype": DATATYPE_OF.get(tensor.dtype, tensor.dtype.upper()),
    }
    if binary:
        return {**described, "parameters": {"binary_data_size": len(tensor.data)}}
    return {**described, "data": np.frombuffer(tensor.data, np.dtype(tensor.dtype).newbyteorder("<")).tolist()}
