"""Whether this board computes what an expert's golden pair says, before any task may reach the expert.

Run in the updater's process: the expert itself runs in a child with the memory that its manifest asks for, so that one
which crashes, hangs or eats memory takes nothing down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bmoe.inference.runner import ExpertFile, Runner
from bmoe.protocol.errors import InferenceError, ManifestError
from bmoe.protocol.tensors import Tensor
from bmoe.storage.golden import read_golden
from bmoe.storage.manifest import Expert, TensorSpec

RUN_S = 60.0
# What a session and its library need besides what the expert's own memory is stated to be.
SPARE_MB = 256


def reproduces_golden(part: Expert, path: Path, golden: Path | None) -> None:
    """Raise ManifestError for no golden pair or one of another form, InferenceError for an expert that does not run here
    or whose outputs differ from its golden pair's by more than their tolerance."""
    if golden is None:
        raise ManifestError(f"{part.file} has no golden pair to test it by")
    inputs, expected = read_golden(golden.read_bytes())
    if set(inputs) != {spec.name for spec in part.inputs} or set(expected) != {spec.name for spec in part.outputs}:
        raise ManifestError(f"{part.file}: the golden pair has other tensors than the manifest")
    found = asyncio.run(_run(part, path, inputs))
    for spec in part.outputs:
        gap = _gap(spec, found.get(spec.name), expected[spec.name])
        if not gap <= spec.epsilon:
            raise InferenceError(
                f"{part.file} does not reproduce its golden pair here: output {spec.name} differs by {gap:.3g}, "
                f"allowed are {spec.epsilon:.3g}"
            )


async def _run(part: Expert, path: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = [_tensor(spec.name, inputs[spec.name]) for spec in part.inputs]
    async with Runner(memory_mb=part.memory_mb + SPARE_MB) as runner:
        result = await runner.run(ExpertFile(bytes.fromhex(part.sha256), path), tensors, timeout_s=RUN_S)
    return {t.name: np.frombuffer(t.data, np.dtype(t.dtype).newbyteorder("<")).reshape(t.dims) for t in result.outputs}


def _tensor(name: str, array: np.ndarray) -> Tensor:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return Tensor(name, array.dtype.name, array.shape, little.tobytes())


def _gap(spec: TensorSpec, found: np.ndarray | None, expected: np.ndarray) -> float:
    """The largest |x - y| in float64; infinite where shapes or dtypes differ, NaN where one is not a number."""
    if found is None or found.shape != expected.shape or found.dtype.name != expected.dtype.name:
        return float("inf")
    if found.dtype.kind != "f":
        return 0.0 if np.array_equal(found, expected) else float("inf")
    gap = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    return float(np.max(gap, initial=0.0))
