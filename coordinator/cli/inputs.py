"""Input files of `bmoe infer`: .npy, .npz or a JSON infer body. Nothing pickled is ever loaded."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import numpy as np

from bmoe.client import Client
from bmoe.protocol.errors import InputError

# What a file that is none of the three forms makes its readers raise.
MALFORMED = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
    zipfile.BadZipFile,
)  # fmt: skip
DTYPES = {"FP32": "float32", "FP64": "float64", "BOOL": "bool"}


def read_inputs(file: Path, client: Client, model: str) -> dict[str, np.ndarray]:
    """Arrays by input name; raises InputError for a file that is none of the three forms."""
    try:
        if file.suffix == ".npy":
            return {_only_input(client, model): np.load(file, allow_pickle=False)}
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        body = json.loads(data)
        return {i["name"]: _array(i) for i in body["inputs"]}
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except MALFORMED as error:
        raise InputError(f"{file} is no .npy, .npz or JSON infer body: {error}") from error


def _array(given: dict[str, object]) -> np.ndarray:
    datatype = str(given["datatype"])
    return np.array(given["data"], dtype=DTYPES.get(datatype, datatype.lower())).reshape(given["shape"])  # type: ignore[call-overload]


def _only_input(client: Client, model: str) -> str:
    names = [i["name"] for i in client.metadata(model)["inputs"]]
    if len(names) != 1:
        raise InputError(f"model {model} takes the inputs {names}: give an .npz with these names")
    return str(names[0])
