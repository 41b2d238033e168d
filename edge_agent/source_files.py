"""Files as requests: .npy, .npz, .json and .csv, read within bounds. Whatever is none is refused with the reason."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import PurePath
from tokenize import TokenError
from typing import Any

import numpy as np

from bmoe.ledger.rules.released import ReleasedModel
from bmoe.protocol.errors import MessageError

SUFFIXES = (".npy", ".npz", ".json", ".csv")
# A member of an .npz may be packed: what it unpacks to is bounded, too.
UNPACKED_FACTOR = 4


def read_inputs(name: str, data: bytes, model: ReleasedModel, limit: int) -> Mapping[str, Any]:
    """Arrays by input name, or an infer body, from a file's bytes; raises MessageError.

    .npy: the model's one input. .npz: arrays by input name. .json: an infer body, or lists by input name. .csv: rows of
    numbers, each the values of one row of the model's one input.
    """
    suffix = PurePath(name).suffix.lower()
    if len(data) > limit:
        raise MessageError(f"{name} has {len(data)} bytes, at most {limit} are taken")
    try:
        if suffix == ".json":
            return _json(data)
        if suffix == ".csv":
            return {_only_input(model): _csv(data, model)}
        if suffix == ".npy":
            return {_only_input(model): np.load(io.BytesIO(data), allow_pickle=False)}
        return _npz(data, limit)
    except MessageError:
        raise
    except (
        ArithmeticError, ValueError, TypeError, LookupError, OSError, EOFError, zipfile.BadZipFile, RecursionError
    ) as error:  # fmt: skip
        raise MessageError(f"{name} cannot be read: {' '.join(str(error).split())[:200]}") from None
    except (MemoryError, NotImplementedError, RuntimeError, SyntaxError, TokenError, zlib.error) as error:
        raise MessageError(f"{name} cannot be read: {type(error).__name__}") from None


def _json(data: bytes) -> Mapping[str, Any]:
    values = json.loads(data)
    if not isinstance(values, dict):
        raise MessageError(f"expected a JSON object, found {type(values).__name__}")
    return values


def _csv(data: bytes, model: ReleasedModel) -> np.ndarray:
    dims = list(model.inputs[0][2])
    if not data.strip():
        raise MessageError("the file is empty")
    table = np.loadtxt(io.StringIO(data.decode()), delimiter=",", dtype=np.float64, ndmin=2)
    shape = [d or -1 for d in dims]
    if model.batch:
        shape = [len(table), *shape[1:]]
    if shape.count(-1) > 1:
        raise MessageError(f"an input of shape {dims} cannot be told from rows of numbers: use .npz or .json")
    array = table.reshape(shape)
    integers = array.astype(np.int64)
    return integers if np.dtype(model.inputs[0][1]).kind in "iu" and np.array_equal(integers, array) else array


def _npz(data: bytes, limit: int) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > UNPACKED_FACTOR * limit:
        raise MessageError(f"the archive unpacks to {unpacked} bytes, at most {UNPACKED_FACTOR * limit} are taken")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _only_input(model: ReleasedModel) -> str:
    if len(model.inputs) != 1:
        names = [spec[0] for spec in model.inputs]
        raise MessageError(f"the model has the inputs {names}: use .npz or .json, which name them")
    return str(model.inputs[0][0])
