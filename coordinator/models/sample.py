"""Inputs to try a model with: drawn with a fixed seed, of the declared shapes, or given by the owner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bmoe.protocol.errors import InputError, ManifestError
from bmoe.storage.golden import MAX_BYTES, read_arrays
from bmoe.storage.onnx_file import Value
from coordinator.models.trial import Arrays

SEED = 20_250_912
ROWS = 4
# Tried in this order for every size that the file leaves open, until the model takes it.
OPEN_SIZES = (8, 16, 32, 64, 224)
Shapes = Mapping[str, tuple[int, ...]]


def candidates(values: Sequence[Value], shapes: Shapes, rows: int | None) -> Iterator[Arrays]:
    """Samples to try, one for each size. `rows`: how many along axis 0 where that is open."""
    unknown = set(shapes) - {value.name for value in values}
    if unknown:
        raise InputError(f"--shape names {sorted(unknown)}, the model takes {[value.name for value in values]}")
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for size in OPEN_SIZES:
        dims = tuple(_dims(value, shapes, rows, size) for value in values)
        if dims not in seen:
            seen.add(dims)
            draw = np.random.default_rng(SEED)
            yield {value.name: _drawn(draw, value, d) for value, d in zip(values, dims, strict=True)}


def given(path: Path, values: Sequence[Value]) -> Arrays:
    """The owner's own inputs: an .npz with arrays called as the inputs are, or in.NAME as in a golden pair."""
    try:
        with path.open("rb") as file:
            found = read_arrays(file.read(MAX_BYTES))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ManifestError as error:
        raise InputError(f"{path}: {error}") from None
    chosen = {}
    for value in values:
        array = found.get(value.name, found.get(f"in.{value.name}"))
        if array is None:
            raise InputError(f"{path}: expected an array {value.name!r}, found {sorted(found)[:8]}")
        if array.dtype.name != value.dtype:
            raise InputError(f"{path}: {value.name!r} is {array.dtype.name}, the model takes {value.dtype}")
        chosen[value.name] = array
    return chosen


def _dims(value: Value, shapes: Shapes, rows: int | None, size: int) -> tuple[int, ...]:
    if value.name in shapes:
        return shapes[value.name]
    if value.dims is None:
        raise InputError(f"the file gives no shape of input {value.name!r}: say it with --shape {value.name}=4,10")
    open_first = rows if rows is not None else 1
    return tuple(d if isinstance(d, int) else (open_first if axis == 0 else size) for axis, d in enumerate(value.dims))


def _drawn(draw: np.random.Generator, value: Value, dims: tuple[int, ...]) -> np.ndarray:
    """Floats of a normal distribution; integers 0 or 1, for they are often indices into something small."""
    if value.dtype.startswith("float"):
        return draw.standard_normal(dims).astype(value.dtype)
    return draw.integers(0, 2, dims).astype(value.dtype)
