"""Request bodies made before the clock runs, each with inputs that no request before it had.

The first number of every row is a slot, filled from a counter when the request is sent: no cache of the gateway's,
by request or by row, can answer twice. Two forms of the Open Inference Protocol v2, JSON and its binary extension, and
raw numbers for a peer that speaks neither.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from bmoe.protocol.errors import MessageError

ENCODINGS = ("json", "binary")
# Slot values are 1/4 and up, in steps of 2^-24: exact in float32, told apart by ten decimals, never twice in a run.
SLOT_STEPS = 1 << 23
SLOT_UNIT = 1 / (1 << 24)


@dataclass(frozen=True)
class Template:
    """A whole HTTP request with one slot a row: `parts[0] slot parts[1] slot ... parts[rows]`.

    `windows` are the float32 inputs [rows, ...]; element 0 of each row is the slot's.
    """

    parts: tuple[bytes, ...]
    windows: np.ndarray
    spell: Callable[[float], bytes]

    @property
    def rows(self) -> int:
        """Rows in one request."""
        return len(self.parts) - 1

    def fill(self, number: int) -> bytes:
        """The `number`-th request's bytes."""
        woven: list[bytes] = [self.parts[0]]
        for row, part in enumerate(self.parts[1:]):
            woven += (self.spell(slot_value(number * self.rows + row)), part)
        return b"".join(woven)

    def inputs(self, number: int) -> np.ndarray:
        """What the `number`-th request asks about: float32 [rows, ...]."""
        filled = self.windows.copy()
        flat = filled.reshape(self.rows, -1)
        flat[:, 0] = [slot_value(number * self.rows + row) for row in range(self.rows)]
        return filled


def slot_value(count: int) -> float:
    """A number in [0.25, 0.75), exact in float32, another for each of 2^23 successive counts."""
    return 0.25 + count % SLOT_STEPS * SLOT_UNIT


def template(
    windows: np.ndarray, name: str, encoding: str, path: str, parameters: Mapping[str, Any], host: str
) -> Template:
    """A request about `windows` (float32 [rows, ...]) as the input `name`, in the given encoding."""
    windows = np.ascontiguousarray(windows, "<f4")
    make = {"json": _json, "binary": _binary, "raw": _raw}[encoding]
    parts, spell, header_length = make(windows, name, parameters)
    length = sum(map(len, parts)) + len(windows) * len(spell(slot_value(0)))
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {length}"]
    lines += [f"Inference-Header-Content-Length: {header_length}"] if header_length else []
    lines += [f"Content-Type: application/{'json' if encoding == 'json' else 'octet-stream'}"]
    head = "\r\n".join([*lines, "", ""]).encode()
    return Template((head + parts[0], *parts[1:]), windows, spell)


def _json(windows: np.ndarray, name: str, parameters: Mapping[str, Any]) -> tuple[list[bytes], Any, int]:
    request = {
        "inputs": [{"name": name, "shape": list(windows.shape), "datatype": "FP32", "data": "HERE"}],
        "parameters": dict(parameters),
    }
    before, after = orjson.dumps(request).split(b'"HERE"')
    rows = [orjson.dumps(row[1:], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] for row in windows.reshape(len(windows), -1)]
    parts = [before + b"[", *(b"," + row + b"," for row in rows[:-1]), b"," + rows[-1] + b"]" + after]
    return parts, lambda value: b"%.10f" % value, 0


def _binary(windows: np.ndarray, name: str, parameters: Mapping[str, Any]) -> tuple[list[bytes], Any, int]:
    tensor = {"name": name, "shape": list(windows.shape), "datatype": "FP32"}
    request = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": windows.nbytes}}],
        "parameters": {**parameters, "binary_data_output": True},
    }
    header = orjson.dumps(request)
    rows = [row[1:].tobytes() for row in windows.reshape(len(windows), -1)]
    return [header, *rows], struct.Struct("<f").pack, len(header)


def _raw(windows: np.ndarray, name: str, parameters: Mapping[str, Any]) -> tuple[list[bytes], Any, int]:
    """The numbers alone: for a server that has no protocol of its own."""
    return [b"", *(row[1:].tobytes() for row in windows.reshape(len(windows), -1))], struct.Struct("<f").pack, 0


def first_output(headers: Mapping[str, str], body: bytes) -> np.ndarray:
    """The first output of an answer in any form, float32, raw ones flat; raises MessageError when there is none."""
    if "json" not in headers.get("content-type", "json") and "inference-header-content-length" not in headers:
        return np.frombuffer(body, "<f4")
    try:
        length = int(headers.get("inference-header-content-length", len(body)))
        output = orjson.loads(body[:length])["outputs"][0]
        shape, size = output["shape"], (output.get("parameters") or {}).get("binary_data_size")
        if size is None:
            return np.array(output["data"], "<f4").reshape(shape)
        return np.frombuffer(body[length : length + size], "<f4").reshape(shape)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise MessageError(f"no first output in {body[:120]!r}: {error}") from error
