"""What an ONNX file says of itself, read without running it: opsets, inputs, outputs, operators, external weights.

A reader of its own, so that a gateway judges files of strangers without native code: bounded in depth and work, and
strict where protobuf is lenient (a field that may stand once stands once). Standard library only.
Source: onnx/onnx, onnx.proto (IR version 13).
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bmoe.protocol.errors import ModelError
from bmoe.storage.onnx_wire import BYTES, VARINT, Data, Field, Wire, signed

MAX_DEPTH = 24
# TensorProto.DataType.
ELEMENTS = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16",
    17: "float8e4m3fn", 18: "float8e4m3fnuz", 19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4",
    23: "float4e2m1", 24: "float8e8m0", 25: "uint2", 26: "int2",
}  # fmt: skip
# TypeProto's oneof.
_KINDS = {1: "tensor", 4: "sequence", 5: "map", 7: "opaque", 8: "sparse tensor", 9: "optional"}
# Repeated numbers of an attribute, one field each (floats 7, ints 8): a tree ensemble has millions.
_NUMBERS = {
    0x3D: re.compile(rb"(?:\x3d.{4})+", re.DOTALL),
    0x40: re.compile(rb"(?:\x40[\x80-\xff]{0,9}[\x00-\x7f])+", re.DOTALL),
}
Dims = tuple[int | str | None, ...]


@dataclass(frozen=True)
class Value:
    """An input or output of the graph. `dims`: None where the file states no rank; an item is a number, a symbol, or
    None."""

    name: str
    kind: str
    dtype: str
    dims: Dims | None


@dataclass(frozen=True)
class Operator:
    """An operator, and where it stands: "" for the graph itself, else the attributes or functions that it lies in."""

    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    where: str


@dataclass
class OnnxFile:
    """What was found in a file. `dtypes` are those of all weights, casts and declared values."""

    ir_version: int = 0
    producer: str = ""
    opsets: dict[str, int] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    functions: set[tuple[str, str]] = field(default_factory=set)
    external: list[str] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)
    # Names of constants that hold one false, and of all other constants.
    false: set[str] = field(default_factory=set)
    constants: set[str] = field(default_factory=set)
    # Weights as (graph that holds them, name), the graph named as in Operator.where; and the dtype of each constant.
    weights: set[tuple[str, str]] = field(default_factory=set)
    constant_dtypes: dict[str, str] = field(default_factory=dict)


def read_onnx_file(path: Path) -> OnnxFile:
    """As `read_onnx`, of a file, without loading it. Raises ModelError also where it cannot be read."""
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise ModelError(f"{path.name} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return read_onnx(data)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def read_onnx(data: Data) -> OnnxFile:
    """What the bytes of an ONNX file say. Raises ModelError, one line, for what is none."""
    found = OnnxFile()
    reader = _Reader(Wire(data), found)
    reader.model(len(data))
    return found


class _Reader:
    """Walks one file; each method reads one message of onnx.proto."""

    def __init__(self, wire: Wire, found: OnnxFile) -> None:
        self._wire, self._found = wire, found

    def model(self, size: int) -> None:
        """Read the whole file, a ModelProto of `size` bytes, into what was found; raises ModelError where it is none."""
        graphs: list[Field] = []
        for f in self._wire.fields(0, size):
            if f.number == 1 and f.wire == VARINT:
                self._found.ir_version = f.value
            elif f.number == 2:
                self._found.producer = self._wire.text(f)
            elif f.number == 7:
                graphs.append(_message(f))
            elif f.number == 8:
                domain, version = self._opset(_message(f))
                if self._found.opsets.setdefault(domain, version) != version:
                    raise ModelError(f"two versions of the operators {domain or 'ai.onnx'!r} are imported")
            elif f.number == 25:
                self._function(_message(f))
        if len(graphs) != 1:
            raise ModelError(f"expected one graph, found {len(graphs)}: not an ONNX model")
        self._graph(graphs[0], "", 0)

    def _opset(self, message: Field) -> tuple[str, int]:
        domain, version = "", 0
        for f in self._inside(message):
            if f.number == 1:
                domain = self._wire.text(f)
            elif f.number == 2:
                version = signed(f.value)
        return "" if domain == "ai.onnx" else domain, version

    def _function(self, message: Field) -> None:
        name = domain = ""
        nodes = []
        for f in self._inside(message):
            if f.number == 1:
                name = self._wire.text(f)
            elif f.number == 10:
                domain = self._wire.text(f)
            elif f.number == 7:
                nodes.append(_message(f))
            elif f.number == 9:
                imported, version = self._opset(_message(f))
                self._found.opsets.setdefault(imported, version)
        self._found.functions.add((domain, name))
        for node in nodes:
            self._node(node, f"function {name}", 0)

    def _graph(self, message: Field, where: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ModelError(f"graphs lie in graphs more than {MAX_DEPTH} deep")
        inputs: list[Value] = []
        weights: set[str] = set()
        for f in self._inside(message):
            if f.number == 1:
                self._node(_message(f), where, depth)
            elif f.number == 5:
                weights.add(self._tensor(_message(f)))
            elif f.number == 15:
                weights.add(self._sparse(_message(f)))
            elif f.number == 11 and not depth:
                inputs.append(self._value(_message(f)))
            elif f.number == 12 and not depth:
                self._found.outputs.append(self._value(_message(f)))
        self._found.weights |= {(where, name) for name in weights}
        if not depth:  # old files list weights among the inputs as well
            self._found.inputs += [value for value in inputs if value.name not in weights]

    def _node(self, message: Field, where: str, depth: int) -> None:
        inputs: list[str] = []
        outputs: list[str] = []
        texts = {4: "", 7: ""}
        attributes = []
        for f in self._inside(message):
            if f.number == 1:
                inputs.append(self._wire.text(f))
            elif f.number == 2:
                outputs.append(self._wire.text(f))
            elif f.number in texts:
                texts[f.number] = self._wire.text(f)
            elif f.number == 5:
                attributes.append(_message(f))
        domain = "" if texts[7] == "ai.onnx" else texts[7]
        self._found.operators.append(Operator(domain, texts[4], tuple(inputs), tuple(outputs), where))
        for attribute in attributes:
            label = f"{where}, {texts[4]}" if where else texts[4]
            self._attribute(attribute, label, depth, outputs[0] if texts[4] == "Constant" and outputs else "")

    def _attribute(self, message: Field, where: str, depth: int, constant: str) -> None:
        name, number = "", 0
        graphs: list[Field] = []
        for f in self._wire.fields(message.start, message.end, _NUMBERS):
            if f.number == 1:
                name = self._wire.text(f)
            elif f.number == 3:
                number = f.value
            elif f.number in (5, 10):
                self._tensor(_message(f), constant)
            elif f.number in (22, 23):
                self._sparse(_message(f))
            elif f.number in (6, 11):
                graphs.append(_message(f))
        if name in ("to", "dtype") and number in ELEMENTS:  # of Cast and its like
            self._found.dtypes.add(ELEMENTS[number])
        for graph in graphs:
            self._graph(graph, f"{where} {name}", depth + 1)

    def _tensor(self, message: Field, name: str = "") -> str:
        raw = values = b""
        dtype = ""
        for f in self._inside(message):
            if f.number == 8 and not name:
                name = self._wire.text(f)
            elif f.number == 2:
                dtype = ELEMENTS.get(f.value, f"of type {f.value}")
                self._found.dtypes.add(dtype)
            elif f.number == 9 and f.wire == BYTES and f.end - f.start == 1:
                raw = bytes(self._wire.data[f.start : f.end])
            elif f.number == 5:  # a bool is kept as an int32, packed or not
                values = bytes(self._wire.data[f.start : f.end]) if f.wire == BYTES else bytes([min(f.value, 1)])
            elif f.number == 13:
                self._external(_message(f))
        self._found.constant_dtypes[name] = dtype
        (self._found.false if b"\0" in (raw, values) else self._found.constants).add(name)
        return name

    def _sparse(self, message: Field) -> str:
        names = [self._tensor(_message(f)) for f in self._inside(message) if f.number in (1, 2)]
        return names[0] if names else ""

    def _external(self, message: Field) -> None:
        key = value = ""
        for f in self._inside(message):
            if f.number == 1:
                key = self._wire.text(f)
            elif f.number == 2:
                value = self._wire.text(f, 4096)
        if key == "location":
            self._found.external.append(value)

    def _value(self, message: Field) -> Value:
        name, kind, dtype, dims = "", "value without a type", "", None
        for f in self._inside(message):
            if f.number == 1:
                name = self._wire.text(f)
            elif f.number == 2:
                for t in self._inside(_message(f)):
                    if t.number in _KINDS:
                        kind = _KINDS[t.number]
                        dtype, dims = self._tensor_type(_message(t)) if kind == "tensor" else ("", None)
        return Value(name, kind, dtype, dims)

    def _tensor_type(self, message: Field) -> tuple[str, Dims | None]:
        dtype, dims = "", None
        for f in self._inside(message):
            if f.number == 1:
                dtype = ELEMENTS.get(f.value, f"of type {f.value}")
                self._found.dtypes.add(dtype)
            elif f.number == 2:
                dims = tuple(self._dim(_message(d)) for d in self._inside(_message(f)) if d.number == 1)
        return dtype, dims

    def _dim(self, message: Field) -> int | str | None:
        found: int | str | None = None
        for f in self._inside(message):
            if f.number == 1 and f.wire == VARINT:
                found = signed(f.value) if signed(f.value) >= 0 else None  # some exporters write -1 for any
            elif f.number == 2:
                found = self._wire.text(f) or None
        return found

    def _inside(self, message: Field) -> Iterator[Field]:
        return self._wire.fields(message.start, message.end)


def _message(f: Field) -> Field:
    if f.wire != BYTES:
        raise ModelError(f"field {f.number} before byte {f.end} should be a message: not an ONNX file, or damaged")
    return f
