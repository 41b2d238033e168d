"""A tensor on the wire: name, dtype, dims and raw little-endian row-major bytes. Needs no numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from bmoe.protocol.errors import MessageError

ITEM_BYTES = {
    "float16": 2, "float32": 4, "float64": 8, "bool": 1,
    "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
}  # fmt: skip
MAX_DIMS = 8
MAX_DIM = 2**31 - 1


@dataclass(frozen=True)
class Tensor:
    """One named tensor; `data` holds exactly prod(dims) items of `dtype`, little-endian, row-major."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        expected = tensor_bytes(self.dtype, self.dims)
        if len(self.data) != expected:
            raise MessageError(
                f"tensor {self.name!a} of {self.dtype}{list(self.dims)} needs {expected} bytes, got {len(self.data)}"
            )

    def row(self, index: int) -> bytes:
        """The bytes of row `index` along axis 0."""
        size = len(self.data) // self.dims[0]
        return self.data[index * size : (index + 1) * size]


def tensor_bytes(dtype: str, dims: Sequence[int]) -> int:
    """How many bytes a tensor holds; raises MessageError for an unknown dtype or dims out of 0..2^31-1."""
    if dtype not in ITEM_BYTES:
        raise MessageError(f"dtype {dtype!a} is not one of {', '.join(ITEM_BYTES)}")
    if len(dims) > MAX_DIMS:
        raise MessageError(f"a tensor has at most {MAX_DIMS} dims, got {len(dims)}")
    for dim in dims:
        if type(dim) is not int or not 0 <= dim <= MAX_DIM:
            raise MessageError(f"dims must be integers in 0..2^31-1, got {list(dims)}")
    return prod(dims) * ITEM_BYTES[dtype]


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """One tensor from several that differ in axis 0 alone."""
    first = parts[0]
    dims = (sum(part.dims[0] for part in parts), *first.dims[1:])
    return Tensor(first.name, first.dtype, dims, b"".join(part.data for part in parts))


def take_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows named, in that order, as one tensor."""
    return Tensor(tensor.name, tensor.dtype, (len(rows), *tensor.dims[1:]), b"".join(tensor.row(i) for i in rows))


def row_bytes(tensors: Sequence[Tensor], index: int) -> bytes:
    """Row `index` of several tensors as one byte string, each part preceded by its length (4 bytes, big-endian)."""
    parts = [tensor.row(index) for tensor in tensors]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def row_salt(salt: bytes, index: int) -> bytes:
    """The 16-byte salt of one row: revealing it opens that row's commitment and no other's."""
    return hashlib.sha256(b"bmoe/row-salt/v1" + salt + index.to_bytes(4, "big")).digest()[:16]
