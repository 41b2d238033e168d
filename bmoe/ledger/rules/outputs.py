"""Signed outputs as evidence: parsed, bound to their task, opened against their commitment, made comparable."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from bmoe.ledger.rules.commitments import SALT_BYTES, commit_rows
from bmoe.ledger.rules.voting import Candidate, Tolerance, is_finite
from bmoe.protocol.encoding import bstr, read_bstrs
from bmoe.protocol.errors import InputError, MessageError
from bmoe.protocol.messages import MAX_TENSORS, Output, Release, Sealed, open_message, tensors_from
from bmoe.protocol.tensors import ITEM_BYTES, MAX_DIMS, Tensor

# Dims are equal or they are not.
SHAPE = Tolerance("int64", 0.0)


@dataclass(frozen=True)
class Binding:
    """What an output must be bound to: one task, one expert version, one input."""

    task: bytes
    expert: bytes
    input_root: bytes
    rows: int


def parse_output(envelope: bytes, binding: Binding) -> Sealed[Output]:
    """A signed output for this very task; raises InputError naming the field that differs. Not yet verified."""
    sealed = open_message(Output, envelope)
    header = sealed.header
    for field in ("task", "expert", "input_root", "rows"):
        expected, found = getattr(binding, field), getattr(header, field)
        if expected != found:
            raise MessageError(f"output by {header.author}: {field} is {_show(found)}, the task's is {_show(expected)}")
    return sealed


def opening_of(salt: bytes, tensors: Sequence[Tensor]) -> bytes:
    """The attachment that opens a commitment: the salt, then each tensor's bytes, as CBOR byte strings."""
    return bstr(salt) + b"".join(bstr(t.data) for t in tensors)


def open_output(header: Output, opening: bytes) -> tuple[Tensor, ...]:
    """The tensors behind an output's commitment; raises MessageError when the opening is not the one committed to."""
    parts = read_bstrs(opening, 0, MAX_TENSORS + 1)
    if not parts or len(parts[0]) != SALT_BYTES:
        raise MessageError(f"the opening of {header.author}'s output has no salt of {SALT_BYTES} bytes")
    tensors = tensors_from(header.outputs, parts[1:])
    if commit_rows(header.author, parts[0], tensors, header.rows) != header.output_root:
        raise MessageError(f"the opening is not what {header.author} signed")
    return tensors


def tolerances_of(release: Release) -> tuple[Tolerance, ...]:
    """The tolerance of each part that `comparable` gives: the outputs' (epsilon kept as float64 bits), then shapes'."""
    outputs = [Tolerance(o[1], struct.unpack(">d", o[3])[0]) for o in release.outputs]
    return (*outputs, *(SHAPE for o in release.outputs if untold(o, release.batch)))


def comparable(tensors: Sequence[Tensor], release: Release) -> tuple[bytes, ...]:
    """What a vote compares: each tensor's bytes, then the dims (int64) of those whose bytes do not tell them.

    [2, 3] and [3, 2] have the same bytes, so without its dims a liar's shape would agree with an honest one.
    """
    shaped = [t for t, o in zip(tensors, release.outputs, strict=True) if untold(o, release.batch)]
    return (*(t.data for t in tensors), *(pack_dims(t.dims) for t in shaped))


def untold(spec: Sequence[Any], batch: bool) -> bool:
    """Whether a tensor's dims cannot be told from its declaration, its rows and its bytes: more than one is free."""
    return tuple(spec[2][1:] if batch else spec[2]).count(0) > 1


def pack_dims(dims: Sequence[int]) -> bytes:
    """Dims as little-endian int64."""
    return struct.pack(f"<{len(dims)}q", *dims)


def unpack_dims(data: bytes) -> tuple[int, ...]:
    """The dims that `pack_dims` packed; raises MessageError for bytes that are none."""
    if len(data) % 8 or len(data) > 8 * MAX_DIMS:
        raise MessageError(f"dims are at most {MAX_DIMS} int64, got {len(data)} bytes")
    return struct.unpack(f"<{len(data) // 8}q", data)


def candidate_of(header: Output, tensors: Sequence[Tensor], release: Release) -> Candidate | None:
    """The value to vote with, or None when it is not one the release allows: wrong name, type, shape, or not finite."""
    try:
        check_specs(tensors, release.outputs, header.rows if release.batch else None)
    except InputError:
        return None
    candidate = Candidate(header.author, comparable(tensors, release))
    return candidate if is_finite(candidate, tolerances_of(release)) else None


def check_specs(tensors: Sequence[Tensor], specs: Sequence[Sequence[Any]], rows: int | None) -> None:
    """Raise MessageError unless the tensors are those declared; a dim of 0 in a spec is free, axis 0 is `rows`."""
    if len(tensors) != len(specs):
        raise MessageError(f"expected {len(specs)} tensors, found {len(tensors)}")
    for tensor, spec in zip(tensors, specs, strict=True):
        name, dtype, dims = spec[0], spec[1], tuple(spec[2])
        if rows is not None:
            dims = (rows, *dims[1:])
        fits = len(dims) == len(tensor.dims) and all(d in (0, t) for d, t in zip(dims, tensor.dims, strict=False))
        if tensor.name != name or tensor.dtype != dtype or not fits:
            shape = ["any" if d == 0 else d for d in dims]
            raise MessageError(
                f"expected {name!a} {dtype}{shape}, found {tensor.name!a} {tensor.dtype}{list(tensor.dims)}"
            )


def fit_spec(spec: Sequence[Any], batch: bool, rows: int, part: bytes) -> tuple[str, str, tuple[int, ...]]:
    """Name, dtype and dims of a tensor whose bytes are known to fit a declaration with at most one free dim."""
    dims = list(spec[2])
    if batch and dims:
        dims[0] = rows
    free = [i for i, d in enumerate(dims) if d == 0]
    if len(free) == 1:
        known = prod(d or 1 for d in dims)
        dims[free[0]] = len(part) // (known * ITEM_BYTES[spec[1]])
    return spec[0], spec[1], tuple(dims)


def _show(value: object) -> object:
    return value.hex()[:16] if isinstance(value, bytes) else value
