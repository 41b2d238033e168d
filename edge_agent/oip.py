"""The Open Inference Protocol's JSON as a source gives and takes it: arrays fitted to a model, replies read.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md. Nothing that a source gave is changed:
numbers that do not fit the model's type are refused, never rounded or wrapped, but for floats of another width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from reprlib import repr as short
from typing import Any

import numpy as np

from bmoe.client import DATATYPES
from bmoe.ledger.rules.outputs import check_specs
from bmoe.protocol.errors import MessageError
from bmoe.protocol.tensors import Tensor

_DTYPES = {word: dtype for dtype, word in DATATYPES.items()}


def fitted(given: Mapping[str, Any], specs: Sequence[Sequence[Any]], batch: bool) -> tuple[Tensor, ...]:
    """The inputs of a model, `specs` [name, dtype, dims with 0 for any], from arrays by name or an infer body.

    An array without the row axis is one row. Raises MessageError saying what was expected and what came.
    """
    arrays = _arrays(given) if isinstance(given.get("inputs"), list) else given
    wanted = [spec[0] for spec in specs]
    if sorted(map(str, arrays)) != sorted(wanted):
        raise MessageError(f"the model takes the inputs {wanted}, got {short(list(arrays))}")
    tensors = tuple(_fit(arrays[spec[0]], spec, batch) for spec in specs)
    rows = tensors[0].dims[0] if batch and tensors and tensors[0].dims else None
    if rows == 0:
        raise MessageError("a request has at least one row, this one none")
    check_specs(tensors, specs, rows)
    return tensors


def _arrays(body: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of an infer body."""
    arrays = {}
    for item in body["inputs"]:
        if not isinstance(item, dict) or not {"name", "shape", "datatype", "data"} <= set(item):
            raise MessageError("inputs must be a list of objects with name, shape, datatype and data")
        name, shape, dtype = str(item["name"]), item["shape"], _DTYPES.get(str(item["datatype"]))
        if dtype is None or not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
            raise MessageError(
                f"input {name!r}: datatype must be one of {', '.join(_DTYPES)} and shape a list of integers"
            )
        array = _array(item["data"], name)
        if array.size != prod(shape):
            raise MessageError(f"input {name!r}: shape {shape} needs {prod(shape)} items of data, got {array.size}")
        try:
            arrays[name] = array.reshape(shape) if array.size else np.zeros(shape, dtype)
        except ValueError as error:  # beyond what an array can be, which a 0 in the shape hides from the count
            raise MessageError(f"input {name!r}: no array has the shape {short(shape)}: {error}") from None
    return arrays


def _array(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise MessageError(f"input {name!r} is no regular array: {error}") from None
    if array.dtype.kind not in "biuf":
        raise MessageError(f"input {name!r} must be of numbers or of true and false, found {array.dtype}")
    return array


def _fit(values: Any, spec: Sequence[Any], batch: bool) -> Tensor:
    name, dtype, dims = spec[0], np.dtype(spec[1]).newbyteorder("<"), spec[2]
    array = _array(values, name)
    if batch and array.ndim == len(dims) - 1:
        array = array[np.newaxis]
    if array.dtype != dtype:
        takes = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}[dtype.kind]
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(dtype) if array.dtype.kind in takes else None
        if cast is None or (dtype.kind in "iu" and not np.array_equal(cast, array)):
            raise MessageError(f"input {name!r}: {array.dtype} values do not fit {spec[1]}")
        array = cast
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise MessageError(f"input {name!r} has a value that is not finite in {spec[1]}")
    return Tensor(name, spec[1], tuple(array.shape), array.tobytes())


def infer_body(tensors: Sequence[Tensor], client_id: str, parameters: Mapping[str, str]) -> bytes:
    """The body that asks for these inputs' answer; raises MessageError for a datatype that JSON has no spelling of."""
    return json.dumps(
        {"id": client_id, "inputs": [_spelled(t) for t in tensors], "parameters": dict(parameters)}
    ).encode()


def local_reply(model: str, version: int, client_id: str, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """What a board says where the gateway cannot be asked: in the form of a reply, and marked as unverified."""
    return {
        "id": client_id,
        "model_name": model,
        "model_version": str(version),
        "outputs": [_spelled(t) for t in tensors],
        "parameters": {"assurance": "unverified", "stage": "local", "verdicts": []},
    }


def outputs_of(reply: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The outputs of a reply, in its order; raises MessageError for one that cannot be read."""
    try:
        arrays = _arrays({"inputs": reply["outputs"]})
        types = {str(item["name"]): _DTYPES[item["datatype"]] for item in reply["outputs"]}
    except (KeyError, TypeError) as error:
        raise MessageError(f"the reply cannot be read: {error!r}") from None
    return tuple(
        Tensor(name, types[name], tuple(array.shape), array.astype(np.dtype(types[name]).newbyteorder("<")).tobytes())
        for name, array in arrays.items()
    )


def arrays_of(tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Arrays by name."""
    return {t.name: np.frombuffer(t.data, np.dtype(t.dtype).newbyteorder("<")).reshape(t.dims) for t in tensors}


def _spelled(tensor: Tensor) -> dict[str, Any]:
    datatype = DATATYPES.get(tensor.dtype)
    if datatype is None:
        raise MessageError(f"{tensor.name!r}: {tensor.dtype} cannot be spelled in JSON")
    array = arrays_of([tensor])[tensor.name]
    return {
        "name": tensor.name,
        "shape": list(tensor.dims),
        "datatype": datatype,
        "data": array.reshape(-1).tolist(),
    }
