"""Tiny ONNX models for tests, written as protobuf bytes by hand: right, slow, hungry and broken ones.

Field numbers are those of onnx.proto (ONNX 1.17). Numpy arrays go in as initializers; nothing else is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FLOAT, INT64, STRING, BOOL = 1, 7, 8, 9
ELEMENT_TYPES = {"float32": FLOAT, "uint8": 2, "int8": 3, "int32": 6, "int64": INT64, "bool": BOOL, "float64": 11}
IR_VERSION, OPSET = 8, 17
Dims = Sequence[int | str]


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def field(number: int, value: int | str | bytes) -> bytes:
    """One protobuf field: a varint for an int, length-delimited for text and sub-messages."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def fields(number: int, values: Sequence[int | str | bytes]) -> bytes:
    return b"".join(field(number, value) for value in values)


def tensor(name: str, array: np.ndarray) -> bytes:
    """A TensorProto with raw data."""
    kind = field(2, ELEMENT_TYPES[array.dtype.name])
    return fields(1, array.shape) + kind + field(8, name) + field(9, array.tobytes())


def external_tensor(name: str, dims: Sequence[int], location: str) -> bytes:
    """A float32 TensorProto whose data lie in another file."""
    return (
        fields(1, dims)
        + field(2, FLOAT)
        + field(8, name)
        + field(13, field(1, "location") + field(2, location))
        + field(14, 1)
    )


def value(name: str, element: int, dims: Dims | None) -> bytes:
    """A ValueInfoProto of a tensor; a str in `dims` is a symbolic dimension, None an unknown rank."""
    shape = b""
    if dims is not None:
        shape = field(2, b"".join(field(1, field(2 if isinstance(dim, str) else 1, dim)) for dim in dims))
    return field(1, name) + field(2, field(1, field(1, element) + shape))


def sequence_value(name: str) -> bytes:
    """A ValueInfoProto of a sequence of float32 tensors."""
    return field(1, name) + field(2, field(4, field(1, field(1, field(1, FLOAT)))))


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> bytes:
    """A NodeProto; an attribute is an int, an array (a tensor) or bytes (a graph)."""
    out = fields(1, inputs) + fields(2, outputs) + field(4, op)
    for name, given in attributes.items():
        if isinstance(given, int):
            body = field(3, given) + field(20, 2)
        elif isinstance(given, np.ndarray):
            body = field(5, tensor(name, given)) + field(20, 4)
        else:
            body = field(6, given) + field(20, 5)
        out += field(5, field(1, name) + body)
    return out


def graph(
    nodes: Sequence[bytes], inputs: Sequence[bytes], outputs: Sequence[bytes], initializers: Sequence[bytes] = ()
) -> bytes:
    return fields(1, nodes) + field(2, "g") + fields(5, initializers) + fields(11, inputs) + fields(12, outputs)


def model(body: bytes) -> bytes:
    """A ModelProto, ready to be written to a file."""
    return field(1, IR_VERSION) + field(7, body) + field(8, field(1, "") + field(2, OPSET))


def mlp(columns: int = 4, classes: int = 3, seed: int = 7) -> bytes:
    """x float32[N, columns] -> probabilities float32[N, classes], label int64[N]: a hidden layer of 32."""
    draw = np.random.default_rng(seed)
    weights = {"w1": (columns, 32), "b1": (32,), "w2": (32, classes), "b2": (classes,)}
    return model(
        graph(
            [
                node("Gemm", ["x", "w1", "b1"], ["h"]),
                node("Relu", ["h"], ["r"]),
                node("Gemm", ["r", "w2", "b2"], ["z"]),
                node("Softmax", ["z"], ["probabilities"], axis=1),
                node("ArgMax", ["z"], ["label"], axis=1, keepdims=0),
            ],
            [value("x", FLOAT, ["N", columns])],
            [value("probabilities", FLOAT, ["N", classes]), value("label", INT64, ["N"])],
            [tensor(name, draw.standard_normal(shape, np.float32)) for name, shape in weights.items()],
        )
    )


def slow(size: int = 128) -> bytes:
    """turns int64[] and x float32[size, size] -> y float32[size, size]: squares x `turns` times, in native code."""
    body = graph(
        [
            node("MatMul", ["v", "v"], ["s"]),
            node("Clip", ["s", "low", "high"], ["v_out"]),
            node("Identity", ["c"], ["c_out"]),
        ],
        [value("i", INT64, []), value("c", BOOL, []), value("v", FLOAT, [size, size])],
        [value("c_out", BOOL, []), value("v_out", FLOAT, [size, size])],
        [tensor("low", np.array(-1, np.float32)), tensor("high", np.array(1, np.float32))],
    )
    return model(
        graph(
            [node("Loop", ["turns", "yes", "x"], ["y"], body=body)],
            [value("turns", INT64, []), value("x", FLOAT, [size, size])],
            [value("y", FLOAT, [size, size])],
            [tensor("yes", np.array(True))],
        )
    )


def hungry() -> bytes:
    """items int64[1] -> last float32[1]: makes a tensor of that many float32 zeros (4 bytes each) and reads one."""
    return model(
        graph(
            [
                node("ConstantOfShape", ["items"], ["zeros"], value=np.zeros(1, np.float32)),
                node("Gather", ["zeros", "first"], ["last"], axis=0),
            ],
            [value("items", INT64, [1])],
            [value("last", FLOAT, [1])],
            [tensor("first", np.array([0], np.int64))],
        )
    )


def echo(element: int = FLOAT, dims: Dims | None = ("N", 2)) -> bytes:
    """x -> y, the same tensor."""
    return model(graph([node("Identity", ["x"], ["y"])], [value("x", element, dims)], [value("y", element, dims)]))


def gather() -> bytes:
    """index int64[N] -> y float32[N] out of a table of 4: an index of 4 or more fails while running."""
    table = tensor("table", np.arange(4, dtype=np.float32))
    return model(
        graph(
            [node("Gather", ["table", "index"], ["y"], axis=0)],
            [value("index", INT64, ["N"])],
            [value("y", FLOAT, ["N"])],
            [table],
        )
    )


def with_external_data(location: str) -> bytes:
    """y = x + w with w float32[2] in the file `location`, which a single-file expert may not have."""
    return model(
        graph(
            [node("Add", ["x", "w"], ["y"])],
            [value("x", FLOAT, [2])],
            [value("y", FLOAT, [2])],
            [external_tensor("w", [2], location)],
        )
    )


def sequence_output() -> bytes:
    """x float32[2] -> a sequence of tensors, which no output may be."""
    return model(graph([node("SequenceConstruct", ["x", "x"], ["y"])], [value("x", FLOAT, [2])], [sequence_value("y")]))
