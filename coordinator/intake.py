"""Intake: a client's request is named, dated, checked and sized. Open Inference Protocol v2, JSON form.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson

from bmoe.ledger.rules.outputs import check_specs
from bmoe.ledger.rules.policies import FOR_CLIENTS
from bmoe.protocol.errors import MessageError
from bmoe.protocol.tensors import Tensor, tensor_bytes
from coordinator.jobs import WAITS, Request, ServedModel

DATATYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
DATATYPE_OF = {v: k for k, v in DATATYPES.items()}
MAX_ID = 128


def take_in(
    body: bytes,
    model: ServedModel,
    tenant: str,
    default_policy: str,
    rows_max: int,
    clock: Callable[[], int] | None = None,
) -> Request:
    """A checked request from an infer body; raises MessageError saying what was expected and what came."""
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MessageError(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise MessageError("the body must be a JSON object")
    tensors = _tensors(values.get("inputs"), model)
    rows = tensors[0].dims[0] if model.batch else 1
    if not 1 <= rows <= rows_max:
        raise MessageError(f"a request has 1..{rows_max} rows, this one {rows}: split it")
    check_specs(tensors, model.experts[0].inputs, rows if model.batch else None)
    policy, wait = _parameters(values.get("parameters", {}), default_policy)
    client_id = values.get("id", "")
    if not isinstance(client_id, str) or len(client_id) > MAX_ID:
        raise MessageError(f"id must be text of at most {MAX_ID} characters")
    now = clock() if clock else time.time_ns() // 1_000_000
    names = _outputs(values.get("outputs"), model)
    return Request(os.urandom(16), tenant, model, tensors, rows, policy, wait, client_id, now, names)


def _tensors(inputs: Any, model: ServedModel) -> tuple[Tensor, ...]:
    specs = model.experts[0].inputs
    if not isinstance(inputs, list) or not all(isinstance(i, dict) for i in inputs):
        raise MessageError("inputs must be a list of objects with name, shape, datatype and data")
    by_name = {i.get("name"): i for i in inputs}
    wanted = [s[0] for s in specs]
    if len(by_name) != len(inputs) or set(by_name) != set(wanted):
        raise MessageError(f"model {model.name} takes the inputs {wanted}, got {[i.get('name') for i in inputs]}")
    return tuple(_tensor(by_name[name], name) for name in wanted)


def _tensor(given: dict[str, Any], name: str) -> Tensor:
    dtype = DATATYPES.get(given.get("datatype"))  # type: ignore[arg-type]
    if dtype is None:
        raise MessageError(
            f"input {name!r}: datatype must be one of {', '.join(DATATYPES)}, got {given.get('datatype')!r}"
        )
    shape = given.get("shape")
    if not isinstance(shape, list):
        raise MessageError(f"input {name!r}: shape must be a list of integers")
    expected = tensor_bytes(dtype, shape)
    try:
        array = np.asarray(given.get("data"))
        flat = _converted(array, dtype, name).reshape(-1)
    except (ValueError, TypeError, OverflowError) as error:
        raise MessageError(f"input {name!r}: data is not a regular array of {given['datatype']}: {error}") from error
    data = flat.tobytes()
    if len(data) != expected:
        raise MessageError(
            f"input {name!r}: shape {shape} needs {expected} bytes of {given['datatype']}, data has {len(data)}"
        )
    return Tensor(name, dtype, tuple(shape), data)


def _converted(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The array in the declared type, never changing a value that a client sent: no truncation, no wrap-around."""
    target = np.dtype(dtype).newbyteorder("<")
    if array.dtype.kind not in "biuf":
        raise MessageError(f"input {name!r}: data must hold numbers only")
    if target.kind == "f":
        return array.astype(target)
    if target.kind == "b" and array.dtype.kind != "b":
        raise MessageError(f"input {name!r}: BOOL data must be true or false")
    converted = array.astype(target)
    if array.dtype.kind == "f" or (converted != array).any():
        raise MessageError(f"input {name!r}: data does not fit {DATATYPE_OF[dtype]}")
    return converted


def _parameters(given: Any, default_policy: str) -> tuple[str, str]:
    if not isinstance(given, dict):
        raise MessageError("parameters must be an object")
    policy, wait = given.get("policy", default_policy), given.get("wait", "decided")
    if policy not in FOR_CLIENTS:
        raise MessageError(f"parameters.policy must be one of {', '.join(FOR_CLIENTS)}, got {policy!r}")
    if wait not in WAITS:
        raise MessageError(f"parameters.wait must be one of {', '.join(WAITS)}, got {wait!r}")
    return policy, wait


def _outputs(given: Any, model: ServedModel) -> tuple[str, ...]:
    names = tuple(o[0] for o in model.experts[0].outputs)
    if given is None:
        return names
    if not isinstance(given, list) or not all(isinstance(o, dict) and o.get("name") in names for o in given):
        raise MessageError(f"outputs must be a list of objects naming some of {list(names)}")
    return tuple(o["name"] for o in given)
