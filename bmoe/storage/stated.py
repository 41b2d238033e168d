"""A part of a model as its release on the ledger states it."""

from __future__ import annotations

import struct
from typing import Any

from bmoe.storage.manifest import Expert, TensorSpec


def stated_tensors(part: Expert) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A part's inputs and outputs as a Release states them."""
    outputs = tuple((*_tensor(spec), struct.pack(">d", spec.epsilon)) for spec in part.outputs)
    return tuple(_tensor(spec) for spec in part.inputs), outputs


def _tensor(spec: TensorSpec) -> tuple[str, str, tuple[int, ...]]:
    return spec.name, spec.dtype, tuple(0 if dim is None else dim for dim in spec.dims)
