"""Weights that an exporter put into other files, taken into the ONNX file itself: an expert is one file.

Only the bytes that must change are written anew; everything else is copied as it stands. Only files inside the model's
folder are read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bmoe.protocol.errors import ModelError
from bmoe.storage.onnx_file import MAX_DEPTH
from bmoe.storage.onnx_rules import leaves_folder
from bmoe.storage.onnx_wire import BYTES, Field, Wire

INLINED = ".inlined.onnx"
# Where tensors lie, by message of onnx.proto: field number -> the message in it.
_TREE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 6: "graph", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_RAW_DATA, _EXTERNAL, _LOCATION = 9, 13, 14
Fetch = Callable[[str, int, int | None], bytes]


def inlined(path: Path) -> bytes:
    """The model at `path` with all its weights in it. Raises ModelError for weights that are not there, or outside."""
    return _rewritten(Wire(path.read_bytes()), "model", None, lambda *where: _fetched(path.parent, *where), 0)


def _rewritten(wire: Wire, message: str, at: Field | None, fetch: Fetch, depth: int) -> bytes:
    if depth > 4 * MAX_DEPTH:
        raise ModelError(f"graphs lie in graphs more than {MAX_DEPTH} deep")
    start, end = (0, len(wire.data)) if at is None else (at.start, at.end)
    if message == "tensor":
        return _tensor(wire, start, end, fetch)
    out = bytearray()
    copied = start
    for field in wire.fields(start, end):
        inner = _TREE[message].get(field.number)
        if inner is None or field.wire != BYTES:
            out += wire.data[copied : field.end]
        else:
            body = _rewritten(wire, inner, field, fetch, depth + 1)
            out += _prefix(field.number, BYTES) + _varint(len(body)) + body
        copied = field.end
    return bytes(out)


def _tensor(wire: Wire, start: int, end: int, fetch: Fetch) -> bytes:
    kept = bytearray()
    where: dict[str, str] = {}
    copied = start
    for field in wire.fields(start, end):
        if field.number == _EXTERNAL and field.wire == BYTES:
            pair = {f.number: wire.text(f, 4096) for f in wire.fields(field.start, field.end) if f.number in (1, 2)}
            where[pair.get(1, "")] = pair.get(2, "")
        elif field.number != _LOCATION:
            kept += wire.data[copied : field.end]
        copied = field.end
    if not where:
        return bytes(wire.data[start:end])
    try:
        offset, length = int(where.get("offset", "0")), int(where["length"]) if "length" in where else None
    except ValueError:
        raise ModelError(
            f"external weights at offset {where.get('offset')!r}, length {where.get('length')!r}"
        ) from None
    raw = fetch(where.get("location", ""), offset, length)
    return bytes(kept) + _prefix(_RAW_DATA, BYTES) + _varint(len(raw)) + raw


def _fetched(folder: Path, location: str, offset: int, length: int | None) -> bytes:
    root = folder.resolve()
    path = (root / location).resolve()
    if leaves_folder(location) or root not in path.parents:
        raise ModelError(f"its weights are said to lie at {location!r}, outside its folder: they are not read")
    try:
        with path.open("rb") as file:
            file.seek(max(0, offset))
            data = file.read() if length is None else file.read(max(0, length))
    except OSError as error:
        raise ModelError(f"its weights lie in {location!r}, which cannot be read: {error.strerror}") from None
    if length is not None and len(data) != length:
        raise ModelError(f"its weights lie at {offset}..{offset + length} of {location!r}, which ends before that")
    return data


def _prefix(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
