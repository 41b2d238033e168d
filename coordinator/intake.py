"""Intake: a client's request is named, dated, checked and sized. Open Inference Protocol v2, JSON and binary form.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md, and its binary tensor data extension
(triton-inference-server/server, docs/protocol/extension_binary_data.md): behind a JSON head of announced length lie the
bytes of those inputs that say `binary_data_size`, in order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import chain
from math import prod
from reprlib import repr as short
from typing import Any

import numpy as np
import orjson

from bmoe.ledger.rules.outputs import check_specs
from bmoe.ledger.rules.policies import FOR_CLIENTS, verifies
from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import MessageError
from bmoe.protocol.tensors import Tensor, tensor_bytes
from coordinator.jobs import WAITS, Request

DATATYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
# FP16 has no spelling in JSON, only its bytes.
BINARY_DATATYPES = {**DATATYPES, "FP16": "float16"}
DATATYPE_OF = {v: k for k, v in BINARY_DATATYPES.items()}
MAX_ID = 128
# A list costs three bytes on the wire and about eighty in memory: 16 MiB of `[],` once cost 470 MiB.
LISTS_MAX = 1 << 18
ASSURANCES = ("verified", "unverified")
UNVERIFIED = "single"
# By numpy kind: the JSON values that a datatype takes, and how an error calls them.
_TAKES: dict[str, tuple[set[type], str]] = {
    "b": ({bool}, "true or false"),
    "i": ({int}, "integers"),
    "u": ({int}, "integers"),
    "f": ({int, float}, "numbers"),
}
_JSON_WORDS = {
    str: "text", type(None): "null", dict: "an object", list: "a list", float: "a fraction", int: "an integer",
    bool: "true or false",
}  # fmt: skip

# JSON as large as this would hold up everybody else while it is parsed.
LARGE_BYTES = 256 * 1024


def take_in(
    body: bytes,
    model: ReleasedModel,
    tenant: str,
    default_policy: str,
    rows_max: int,
    clock: Callable[[], int] | None = None,
    head_bytes: int | None = None,
) -> Request:
    """A checked request from an infer body; raises MessageError saying what was expected and what came.

    `head_bytes` is the length of the JSON head where binary tensors follow it.
    """
    head = body if head_bytes is None else memoryview(body)[:head_bytes]
    if head_bytes is not None and head_bytes > len(body):
        raise MessageError(f"Inference-Header-Content-Length is {head_bytes}, the body has {len(body)} bytes")
    check_lists(body, len(head))
    try:
        values = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise MessageError(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise MessageError("the body must be a JSON object")
    tensors = _tensors(values.get("inputs"), model, memoryview(body)[len(head) :])
    rows = tensors[0].dims[0] if model.batch and tensors and tensors[0].dims else 1
    if not 1 <= rows <= rows_max:
        raise MessageError(f"a request has 1..{rows_max} rows, this one {rows}: split it")
    check_specs(tensors, model.experts[0].inputs, rows if model.batch else None)
    parameters = values.get("parameters", {})
    policy, wait = _parameters(parameters, default_policy)
    client_id = values.get("id", "")
    if not isinstance(client_id, str) or len(client_id) > MAX_ID:
        raise MessageError(f"id must be text of at most {MAX_ID} characters")
    now = clock() if clock else time.time_ns() // 1_000_000
    names, binary = _outputs(values.get("outputs"), model, parameters.get("binary_data_output", False))
    return Request(os.urandom(16), tenant, model, tensors, rows, policy, wait, client_id, now, names, binary=binary)


def check_lists(data: bytes, end: int) -> None:
    """Raise MessageError for JSON, up to `end`, that would become more than LISTS_MAX lists and objects."""
    found = data.count(b"[", 0, end) + data.count(b"{", 0, end) if end > LISTS_MAX else 0
    if found > LISTS_MAX:
        raise MessageError(f"the body has {found} lists and objects, at most {LISTS_MAX} are taken: send data flat")


def _tensors(inputs: Any, model: ReleasedModel, rest: memoryview) -> tuple[Tensor, ...]:
    specs = model.experts[0].inputs
    if not isinstance(inputs, list) or not all(isinstance(i, dict) for i in inputs):
        raise MessageError("inputs must be a list of objects with name, shape, datatype and data")
    names, wanted = [i.get("name") for i in inputs], [spec[0] for spec in specs]
    if not all(isinstance(n, str) for n in names) or sorted(names) != sorted(wanted):
        raise MessageError(f"model {model.name} takes the inputs {wanted}, got {short(names)}")
    by_name: dict[str, Tensor] = {}
    for given, name in zip(inputs, names, strict=True):
        parameters = given.get("parameters", {})
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is None:
            by_name[name] = _tensor(given, name, None)
            continue
        if type(size) is not int or not 0 <= size <= len(rest):
            raise MessageError(
                f"input {name!r}: binary_data_size must be a number of bytes that follow, at most {len(rest)} here, "
                f"got {short(size)}"
            )
        by_name[name] = _tensor(given, name, rest[:size])
        rest = rest[size:]
    if len(rest):
        raise MessageError(f"{len(rest)} bytes follow the binary data of all inputs")
    return tuple(by_name[name] for name in wanted)


def _tensor(given: dict[str, Any], name: str, binary: memoryview | None) -> Tensor:
    datatype, shape = given.get("datatype"), given.get("shape")
    datatypes = DATATYPES if binary is None else BINARY_DATATYPES
    dtype = datatypes.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        only = " (FP16 as binary data only)" if datatype == "FP16" else ""
        raise MessageError(
            f"input {name!r}: datatype must be one of {', '.join(datatypes)}, got {short(datatype)}{only}"
        )
    if not isinstance(shape, list) or not all(type(d) is int for d in shape):
        raise MessageError(f"input {name!r}: shape must be a list of integers, got {short(shape)}")
    expected = tensor_bytes(dtype, shape)
    if binary is not None:
        if "data" in given:
            raise MessageError(f"input {name!r} has both data and binary_data_size")
        if len(binary) != expected:
            raise MessageError(
                f"input {name!r}: {datatype} {shape} needs {expected} bytes, binary_data_size is {len(binary)}"
            )
        if dtype == "bool" and bytes(binary).strip(b"\x00\x01"):
            raise MessageError(f"input {name!r}: a BOOL is a byte of 0 or 1")
        return Tensor(name, dtype, tuple(shape), bytes(binary))
    items = _flat(given.get("data"), shape, name)
    if len(items) != prod(shape):
        raise MessageError(f"input {name!r}: shape {shape} needs {prod(shape)} items of data, got {len(items)}")
    return Tensor(name, dtype, tuple(shape), _packed(items, dtype, name))


def _flat(data: Any, shape: list[int], name: str) -> list[Any]:
    """The items in row-major order, from data that is flat or nested as `shape` says.

    Done without numpy, which would make a text of every number once one text is among them: 4 bytes a letter for each.
    """
    if not isinstance(data, list):
        raise MessageError(f"input {name!r}: data must be a list, got {_JSON_WORDS[type(data)]}")
    dims, items = [len(data)], data
    while items and type(items[0]) is list:
        widths = set(map(len, items)) if set(map(type, items)) == {list} else set()
        if len(widths) != 1:
            raise MessageError(f"input {name!r}: nested data must be regular, every list of one level equally long")
        dims.append(widths.pop())
        items = list(chain.from_iterable(items))
    if len(dims) > 1 and dims != shape:
        raise MessageError(f"input {name!r}: data is nested as {short(dims)}, shape says {shape}")
    return items


def _packed(items: list[Any], dtype: str, name: str) -> bytes:
    """The items as bytes, never changing a value that a client sent: no truncation, no wrap-around, no infinity."""
    target = np.dtype(dtype).newbyteorder("<")
    takes, words = _TAKES[target.kind]
    wrong = set(map(type, items)) - takes
    if wrong:
        found = ", ".join(sorted(_JSON_WORDS[kind] for kind in wrong))
        raise MessageError(f"input {name!r}: {DATATYPE_OF[dtype]} takes {words}, found {found}")
    if items and target.kind in "iu":
        limits = np.iinfo(target)
        if min(items) < limits.min or max(items) > limits.max:
            raise MessageError(
                f"input {name!r}: {DATATYPE_OF[dtype]} takes {limits.min}..{limits.max}, found {min(items)}..{max(items)}"
            )
    with np.errstate(over="ignore"):
        array = np.array(items, np.float64).astype(target) if target.kind == "f" else np.array(items, target)
    if target.kind == "f" and not np.isfinite(array).all():
        raise MessageError(f"input {name!r}: a number does not fit {DATATYPE_OF[dtype]}")
    return array.tobytes()


def _parameters(given: Any, default_policy: str) -> tuple[str, str]:
    if not isinstance(given, dict):
        raise MessageError("parameters must be an object")
    assurance = given.get("assurance")
    if assurance not in (None, *ASSURANCES):
        raise MessageError(f"parameters.assurance must be one of {', '.join(ASSURANCES)}, got {short(assurance)}")
    wanted = UNVERIFIED if assurance == "unverified" else default_policy
    policy, wait = given.get("policy", wanted), given.get("wait", "decided")
    if policy not in FOR_CLIENTS:
        raise MessageError(f"parameters.policy must be one of {', '.join(FOR_CLIENTS)}, got {short(policy)}")
    if assurance == "verified" and not verifies(policy):
        raise MessageError(f"parameters.assurance is verified, and policy {policy} verifies nothing")
    if wait not in WAITS:
        raise MessageError(f"parameters.wait must be one of {', '.join(WAITS)}, got {short(wait)}")
    return policy, wait


def _outputs(given: Any, model: ReleasedModel, binary_by_default: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """The outputs wanted, in order, and which of them as binary data."""
    names = tuple(o[0] for o in model.experts[0].outputs)
    if type(binary_by_default) is not bool:
        raise MessageError("parameters.binary_data_output must be true or false")
    if given is None:
        return names, frozenset(names if binary_by_default else ())
    if not isinstance(given, list) or not all(isinstance(o, dict) and o.get("name") in names for o in given):
        raise MessageError(f"outputs must be a list of objects naming some of {list(names)}")
    binary = set()
    for output in given:
        parameters = output.get("parameters", {})
        if not isinstance(parameters, dict) or type(parameters.get("binary_data", False)) is not bool:
            raise MessageError(f"output {output['name']!r}: parameters.binary_data must be true or false")
        if "classification" in parameters or "shared_memory_region" in parameters:
            raise MessageError(f"output {output['name']!r}: classification and shared memory are not offered here")
        if parameters.get("binary_data", binary_by_default):
            binary.add(output["name"])
    return tuple(o["name"] for o in given), frozenset(binary)
